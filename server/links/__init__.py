"""How the ranks of a job find each other, and what they say over their links."""
