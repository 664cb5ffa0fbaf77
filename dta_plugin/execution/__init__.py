"""Who calls the model: packed (the whole forest in one call), `streaming` (in chunks, where that does not fit) or dense
(unmodified, one sequence at a time); and `probing`, whether a tree is exact for it.
"""
