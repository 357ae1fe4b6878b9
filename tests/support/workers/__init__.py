"""Workers of every kind that push by hand: honest, hostile, counted."""
