"""What `pushstep` does with a server's data folder while no server uses it."""
