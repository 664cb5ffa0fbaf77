"""Images on prefix trees: which tokens of which images are the same, and the model's call that sees each once."""
