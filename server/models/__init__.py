"""Models as running things: found by name, driven, observed."""
