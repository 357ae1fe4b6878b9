"""One step of one rule, described, and the checks that its tensors fit each other."""
