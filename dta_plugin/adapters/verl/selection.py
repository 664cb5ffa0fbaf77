"""Which response tokens an update runs, and with what weight: pruning, and token selection (NAT, see token_selection).

Weights travel with a mini-batch as an entry of its own, laid out as `response_mask`, so that they stay with their rows.
What has no weight is not computed: `Rows` cuts every sequence after its last token that has one. Lengths, masks and
counts of the batch stay full, and so do all numbers that verl divides by.

Pruning leaves out tokens whose log-probs the loss cannot read: those of `response_mask` 0; and where neither a KL term
nor an entropy reads it, an advantage of 0. Its one trace is in metrics that average over all tokens, such as ppo_kl: a
token that is left out counts as unchanged there, with a ratio of 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu

from dta_plugin.adapters.verl.config import KEY
from dta_plugin.adapters.verl.micro_batches import ppo_config
from dta_plugin.adapters.verl.rows import WEIGHTS, Rows, padded
from dta_plugin.config import TreeConfig
from dta_plugin.token_selection.select import Drawn, draw

# Registered policy losses by what the loss of one token reads. Its own log-prob only:
TOKEN_LOCAL = {"vanilla", "dppo_tv", "dppo_kl", "sapo", "gpg", "dro", "cispo"}
# Others than its own, but none that are masked, unlike bypass_mode perhaps, which may reject tokens.
_NOT_LOCAL = {"gspo", "geo_mean", "clip_cov", "kl_cov"}
# Those that do not read the log-prob of a token without an advantage, and of a row without any. (dro pulls it towards
# the old one, gspo averages it over its row, the two cov losses rank it among all.)
_NEED_ADVANTAGE = TOKEN_LOCAL - {"dro"} | {"geo_mean"}
_NEED_ADVANTAGE_IN_ROW = {"gspo"}
_MOST_PASSES = 2**20


class Passes:
    """Numbers optimizer passes: no two alike, and a run that was resumed goes on with the numbers it would have had.

    An engine is not told the step of the trainer, but it has a learning rate scheduler, which verl advances once per
    step of the trainer and keeps in checkpoints (unless their contents are set to go without `extra`); mini-batches and
    epochs within a step are counted here.
    """

    def __init__(self) -> None:
        self._at = (-1, 0)

    def next(self, scheduled: int) -> int:
        """The number of a pass that begins after so many steps of the scheduler."""
        before, passes = self._at
        self._at = (scheduled, passes + 1 if scheduled == before else 0)
        return scheduled * _MOST_PASSES + self._at[1]


def objection(data: TensorDict, loss_function: Any, config: TreeConfig) -> str | None:
    """Why `token_selection` cannot be applied to an update, with the remedy, or None."""
    if config.selection() is None:
        return None
    given = f"Got {KEY}.token_selection={config.token_selection}"
    actor = ppo_config(loss_function)
    if actor is None:
        name = getattr(getattr(loss_function, "func", loss_function), "__name__", loss_function)
        return f"{given} with the loss function {name}. Expected verl's ppo_loss. Or set {KEY}.token_selection=all."
    if _mode(actor) not in TOKEN_LOCAL:
        return (
            f"{given} with actor_rollout_ref.actor.policy_loss.loss_mode={_mode(actor)}, in which the loss of a token "
            "may read other tokens, so that a part of them does not give its mean. Expected one of "
            f"{', '.join(sorted(TOKEN_LOCAL))}. Or set {KEY}.token_selection=all."
        )
    if tu.get_non_tensor_data(data, "return_model_output", False):
        return f"{given} with return_model_output, which wants all log-probs. Set {KEY}.token_selection=all."
    return None


def choose(data: TensorDict, loss_function: Any, config: TreeConfig, step: int, rank: int) -> Drawn | None:
    """Give the mini-batch of an update its weights, if not all of its tokens have to run. The drawing, if there is one.

    step: as `Passes` counts. rank: data-parallel. The seed is `actor.data_loader_seed`. For an update that `objection`
    has nothing against.
    """
    actor, selection = ppo_config(loss_function), config.selection()
    if actor is None or not (selection or _may_prune(data, actor, config)):
        return None
    mask = padded(data["response_mask"]).bool().cpu().numpy()
    carries = mask if config.prune == "never" else mask & _has_loss(data, actor, mask)
    if selection is None:
        if carries.sum() < _response_tokens(data):
            _set_weights(data, carries.astype(np.float32))
        return None
    seed = int(actor.data_loader_seed or 0) % 2**32
    drawn = draw(selection, carries, _groups(data), seed=seed, step=step, rank=rank)
    _set_weights(data, drawn.weights)
    return drawn


def clear_weights(data: TensorDict) -> None:
    """As `data` was before `choose`."""
    if WEIGHTS in data.keys():  # noqa: SIM118 (a TensorDict)
        del data[WEIGHTS]


def _mode(actor: Any) -> str:
    return str(actor.policy_loss.get("loss_mode", "vanilla"))


def _may_prune(data: TensorDict, actor: Any, config: TreeConfig) -> bool:
    known = _mode(actor) in TOKEN_LOCAL | _NOT_LOCAL
    may = config.prune == "always" or (config.prune == "auto" and known)
    return may and not tu.get_non_tensor_data(data, "return_model_output", False)


def _has_loss(data: TensorDict, actor: Any, mask: np.ndarray) -> np.ndarray:
    """bool [S, C] or [S, 1]: where the loss can be other than 0 and constant. mask: bool [S, C]."""
    everywhere = np.ones((len(mask), 1), dtype=bool)
    if actor.use_kl_loss or tu.get_non_tensor_data(data, "calculate_entropy", False):
        return everywhere
    has_advantage = (padded(data["advantages"]) != 0).cpu().numpy()
    if _mode(actor) in _NEED_ADVANTAGE:
        return has_advantage
    return (has_advantage & mask).any(1, keepdims=True) if _mode(actor) in _NEED_ADVANTAGE_IN_ROW else everywhere


def _response_tokens(data: TensorDict) -> int:
    rows = Rows.whole(data)
    return sum(len(sequence) - begin for sequence, begin in zip(rows.sequences, rows.begins, strict=True))


def _groups(data: TensorDict) -> list[int]:
    """A number per row, equal where prompts are."""
    rows = Rows.whole(data)
    numbers: dict[bytes, int] = {}
    prompts = (sequence[:begin].tobytes() for sequence, begin in zip(rows.sequences, rows.begins, strict=True))
    return [numbers.setdefault(prompt, len(numbers)) for prompt in prompts]


def _set_weights(data: TensorDict, weights: np.ndarray) -> None:
    """weights: [S, C], 0 beyond a response's end."""
    mask: Any = data["response_mask"]
    values = torch.from_numpy(weights).to(mask.device, torch.float32)
    if mask.is_nested:
        offsets = mask.offsets()
        real = torch.arange(values.shape[1], device=mask.device) < offsets.diff()[:, None]
        values = torch.nested.nested_tensor_from_jagged(values[real], offsets)
    data[WEIGHTS] = values
