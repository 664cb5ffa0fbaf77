"""How much of a GRPO step is the update, and what does the whole step gain? See README.md."""
