"""What an attached optimizer brings: names, parameters, groups, buffers."""
