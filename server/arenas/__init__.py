"""Parameters held, stepped, and sent."""
