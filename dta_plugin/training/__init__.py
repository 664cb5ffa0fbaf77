"""What updates of a policy are, whatever framework trains it: rows as sequences, losses, tokens, placement, metrics."""
