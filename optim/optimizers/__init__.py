"""The optimizers in torch's terms, and the base classes that Keras's and MLX's terms share with them."""
