"""The update rules, over tensors that the caller owns; local and remote steps use the same ones."""
