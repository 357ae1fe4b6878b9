"""Workers of every kind: honest, hostile, and those that local torch must equal."""
