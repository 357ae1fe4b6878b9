"""A model that lies in several ranks: which part is here, and how the parts' measures make those of the whole."""
