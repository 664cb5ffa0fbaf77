"""Prefix trees in verl's Megatron engine; only `install` imports it, once verl has imported its own."""
