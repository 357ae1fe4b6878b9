"""What this server can carry: rates measured on this host, and how many workers of a model they are enough for."""
