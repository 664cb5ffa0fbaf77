"""Unbiased training on a random subset of tokens (NAT). Needs numpy only."""
