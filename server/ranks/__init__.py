"""Several servers as the ranks of one job: who they are, what they say to each other, and what each does with its part."""
