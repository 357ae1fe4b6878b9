"""The channel to the server: attempts, time limits, retries."""
