"""What travels between workers and the server: dtypes, layouts, frames, limits, names."""
