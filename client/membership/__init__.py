"""A worker's membership in a model, and the outcomes of its pushes."""
