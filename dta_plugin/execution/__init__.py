"""Who calls the model: packed (the whole forest in one call) or dense (unmodified, one sequence at a time)."""
