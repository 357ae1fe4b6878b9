"""The operators' door: REST under /v1, with one shape for errors.

The routes only translate. The answer to an edit says from which version on it holds.
"""
