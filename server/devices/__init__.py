"""Where memory lies."""
