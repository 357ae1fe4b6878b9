"""What each rank of a job says of itself, and what rank 0 shows of all of them to operators."""
