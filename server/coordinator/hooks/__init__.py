"""The hooks: they change, refuse or observe a step."""
