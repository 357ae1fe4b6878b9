"""Gradients as the body of a push."""
