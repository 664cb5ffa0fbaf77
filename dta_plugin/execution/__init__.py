"""Who calls the model: packed (the whole forest in one call) and dense (the unmodified path, one sequence at a time)."""
