"""Which row of a batch goes to which micro-batch, rank and optimizer step."""
