"""What the costliest bin costs at least, however sequences are dealt out.

Bins of at most L that hold a node of a tree have L less the path to its end left for what is below it. So what is below
says in how many bins the node is at least, and the sum over nodes what all bins cost at least: L is too little for K
bins where that is above K * L. Without sharing this is the mean.
"""

from __future__ import annotations

import numpy as np

from dta_plugin.balance.costs import SequenceCosts

# Bisection ends where the bound is known this well; relative rounding errors of sums.
_PRECISION, _ROUNDING = 1e-4, 1e-9


def lower_bound(costs: SequenceCosts, bins: int) -> float:
    """No partition into `bins` bins has a costliest bin below it."""
    variable = costs.without_fixed_cost()
    begin, end, below = variable.nodes()
    below[below <= _ROUNDING * variable.total] = 0.0

    def suffices(load: float) -> bool:
        held = np.ones(len(end))
        np.divide(below, load - end, out=held, where=below > 0)
        at_least = np.maximum(np.ceil(held - _ROUNDING), 1.0)
        together = float(((end - begin) * at_least).sum())
        return at_least.max() <= bins and together <= bins * load * (1 + _ROUNDING)

    low, high = max(variable.total / bins, float(variable.path.max())), variable.total
    if suffices(low):
        return costs.fixed_cost + low
    while high > low * (1 + _PRECISION):
        middle = (low + high) / 2
        low, high = (low, middle) if suffices(middle) else (middle, high)
    return costs.fixed_cost + low
