"""Which response tokens an update runs, and with what weight: pruning, and token selection (NAT, see token_selection).

Weights travel with a mini-batch as an entry of its own, laid out as `response_mask`, so that they stay with their rows.
What has no weight is not computed: `JaggedRows` cuts every sequence after its last token that has one. Lengths, masks
and counts of the batch stay full, and so do all numbers that verl divides by.

Pruning leaves out tokens whose log-probs the loss cannot read: those of `response_mask` 0; and where neither a KL term
nor an entropy reads it, an advantage of 0. Its one trace is in metrics that average over all tokens, such as ppo_kl,
and pg_clipfrac with some losses: a token that is left out counts as unchanged there, with a ratio of 1.
"""

from __future__ import annotations

from typing import Any

from tensordict import TensorDict
from torch import nn
from verl.utils import tensordict_utils as tu

from dta_plugin.adapters.verl_plugin.jagged import JaggedRows, padded, set_weights
from dta_plugin.adapters.verl_plugin.losses import (
    POLICY_LOSSES,
    is_verls_policy_loss,
    loss_mode,
    policy_traits,
    ppo_config,
    update_traits,
)
from dta_plugin.config import TreeConfig
from dta_plugin.models.introspection import causal_lm
from dta_plugin.training.losses import tokens_read
from dta_plugin.training.tokens import DrawnTokens, draw_tokens

_MOST_PASSES = 2**20


class OptimizerPasses:
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


def selection_obstacle(data: TensorDict, loss_function: Any, config: TreeConfig, key: str) -> str | None:
    """Why `token_selection` cannot be applied to an update, with the remedy, or None.

    key: where the command has the options.
    """
    if config.selection() is None:
        return None
    given = f"Got {key}.token_selection={config.token_selection}"
    actor = ppo_config(loss_function)
    if actor is None:
        name = getattr(getattr(loss_function, "func", loss_function), "__name__", loss_function)
        return f"{given} with the loss function {name}. Expected verl's ppo_loss. Or set {key}.token_selection=all."
    if not policy_traits(actor).is_token_sum:
        usable = sorted(name for name, traits in POLICY_LOSSES.items() if traits.is_token_sum)
        whose = "" if is_verls_policy_loss(actor) else " (not verl's own)"
        return (
            f"{given} with actor_rollout_ref.actor.policy_loss.loss_mode={loss_mode(actor)}{whose}, in which the "
            "loss of a token may read other tokens, so that a part of them does not give its mean. Expected one of "
            f"verl's own {', '.join(usable)}. Or set {key}.token_selection=all."
        )
    if tu.get_non_tensor_data(data, "return_model_output", False):
        return f"{given} with return_model_output, which wants all log-probs. Set {key}.token_selection=all."
    return None


def choose_tokens(
    data: TensorDict, model: nn.Module | None, loss_function: Any, config: TreeConfig, step: int, rank: int
) -> DrawnTokens | None:
    """Give the mini-batch of an update its weights, if not all of its tokens have to run. The drawing, if there is one.

    model: the engine's, None for text. step: as `OptimizerPasses` counts. rank: data-parallel. The seed is
    `actor.data_loader_seed`. For an update that `selection_obstacle` has nothing against.
    """
    actor, selection = ppo_config(loss_function), config.selection()
    if actor is None or not (selection or _may_prune(data, loss_function, config)):
        return None
    carries = padded(data["response_mask"]).bool()
    if config.prune != "never":
        carries = tokens_read(carries, padded(data["advantages"]), update_traits(loss_function, data))
    rows = JaggedRows.whole(data)
    if selection is None:
        if carries.sum() < rows.response_tokens:
            set_weights(data, carries)
        return None
    seed = int(actor.data_loader_seed or 0) % 2**32
    groups = (rows.runs if model is None else rows.by_content(causal_lm(model))).groups
    drawn = draw_tokens(selection, carries, groups, seed=seed, step=step, rank=rank)
    set_weights(data, drawn.weights)
    return drawn


def _may_prune(data: TensorDict, loss_function: Any, config: TreeConfig) -> bool:
    known = update_traits(loss_function, data).is_known
    may = config.prune == "always" or (config.prune == "auto" and known)
    return may and not tu.get_non_tensor_data(data, "return_model_output", False)
