"""One worker in one model: its pushes and pulls."""
