"""Token weights in verl's losses: means and gradients of a random subset of tokens are, on average, those of all.

`ppo_loss` and the policy losses bring every per-token loss (policy gradient, KL, entropy) together in `agg_loss`, and
metrics in `masked_mean`. While a weighted loss runs, both multiply their values by the weights first; what they divide
by stays verl's, which counts all tokens. So losses and metrics are Horvitz-Thompson estimates for every aggregation.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from tensordict import TensorDict
from verl.trainer.ppo import core_algos
from verl.utils import torch_functional
from verl.workers.utils import losses

from dta_plugin.adapters.verl_plugin.jagged import WEIGHTS, padded

_weights: ContextVar[torch.Tensor | None] = ContextVar("dta_weights", default=None)


def install() -> None:
    """Have verl's modules weigh tokens wherever a loss is `weighted`; elsewhere nothing changes."""
    for module, name in ((core_algos, "agg_loss"), (losses, "agg_loss"), (torch_functional, "masked_mean")):
        setattr(module, name, _weighing(getattr(module, name)))


def weighted(loss_function: Callable[..., Any]) -> Callable[..., Any]:
    """A loss function of verl that weighs the tokens of its micro-batch by the entry `WEIGHTS`."""

    @functools.wraps(loss_function)
    def wrapped(*args: Any, data: TensorDict, **kwargs: Any) -> Any:
        token = _weights.set(padded(data[WEIGHTS]))
        try:
            return loss_function(*args, data=data, **kwargs)
        finally:
            _weights.reset(token)

    return wrapped


def _weighing(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`agg_loss` or `masked_mean`, whose first parameter, values [S, C], is multiplied by the weights [S, C]."""
    signature = inspect.signature(function)
    values = next(iter(signature.parameters))

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:
        weights = _weights.get()
        if weights is None:
            return function(*args, **kwargs)
        given = signature.bind(*args, **kwargs)
        given.arguments[values] = given.arguments[values] * weights
        return function(*given.args, **given.kwargs)

    return wrapped
