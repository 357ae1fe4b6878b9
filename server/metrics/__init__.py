"""What /metrics says: what was counted, as Prometheus reads it."""
