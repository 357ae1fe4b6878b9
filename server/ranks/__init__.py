"""Several servers as the ranks of one job: what rank 0 decides, and what each does with its part."""
