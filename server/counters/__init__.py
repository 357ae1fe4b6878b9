"""What the server counts as it works: plain numbers, written where things happen and read when somebody asks."""
