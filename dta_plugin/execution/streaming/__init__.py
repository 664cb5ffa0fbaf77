"""Streamed execution: a tree larger than memory, chunk by chunk, forward and backward."""
