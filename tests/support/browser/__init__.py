"""A real browser, and trainings that it looks at."""
