"""`share_prefixes`: any model call on padded rows computes what they share once."""
