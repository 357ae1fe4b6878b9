"""A gradient on its way in, within a budget."""
