"""How near numbers must be, and what they are held to."""
