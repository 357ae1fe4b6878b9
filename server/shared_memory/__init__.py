"""Memory that a worker and the server share."""
