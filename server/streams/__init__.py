"""Messages from and to a caller, bounded in time and in bytes."""
