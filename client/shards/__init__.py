"""A model whose parts lie on several servers, the ranks of one group."""
