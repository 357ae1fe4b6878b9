"""Commands that show and steer a running server, over REST."""
