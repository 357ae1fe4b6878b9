"""Memory that this worker and the server share."""
