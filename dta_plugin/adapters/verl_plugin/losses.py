"""verl's losses as traits: which rows of a mini-batch may go to other micro-batches, and which tokens need not run.

`ppo_loss` with one of verl's registered policy losses is known, and so are `value_loss` and `sft_loss`; any other loss
is unknown. So is a policy loss that a user has registered under a name of verl's.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

from tensordict import TensorDict
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, compute_value_loss
from verl.utils import tensordict_utils as tu
from verl.workers.utils.losses import ppo_loss, sft_loss, value_loss

from dta_plugin.training.losses import UNKNOWN, LossTraits, traits_of

_TOKEN_SUM = LossTraits(sums_over="tokens", without_advantage="tokens", normalises_by="step")
_ALL_TOKENS = LossTraits(sums_over="tokens", normalises_by="step")
# In verl 0.8 the loss of values is a mean over a micro-batch, whatever the step: rows stay where they are.
_VALUES_BY_STEP = "dp_size" in inspect.signature(compute_value_loss).parameters
POLICY_LOSSES = {
    **dict.fromkeys(("vanilla", "dppo_tv", "dppo_kl", "sapo", "gpg", "cispo"), _TOKEN_SUM),
    "dro": LossTraits(sums_over="tokens", normalises_by="step"),  # pulls every log-prob towards the old one
    "gspo": LossTraits(sums_over="rows", without_advantage="rows", normalises_by="step"),
    "geo_mean": LossTraits(sums_over="rows", without_advantage="tokens", normalises_by="micro_batch"),
    # These rank the tokens of a micro-batch by covariance.
    **dict.fromkeys(("clip_cov", "kl_cov"), LossTraits(sums_over="batch", normalises_by="micro_batch")),
    # bypass_mode, which may reject tokens or normalise weights over a micro-batch, is left unknown.
}


def ppo_config(loss_function: Any) -> Any:
    """The actor's config in verl's own PPO loss; None for another loss."""
    is_ppo = getattr(loss_function, "func", loss_function) is ppo_loss
    return getattr(loss_function, "keywords", {}).get("config") if is_ppo else None


def loss_mode(actor: Any) -> str:
    """The name of the policy loss in an actor's config."""
    return str(actor.policy_loss.get("loss_mode", "vanilla"))


def policy_traits(actor: Any) -> LossTraits:
    """Of the policy loss in an actor's config."""
    return traits_of(loss_mode(actor), POLICY_LOSSES) if is_verls_policy_loss(actor) else UNKNOWN


def is_verls_policy_loss(actor: Any) -> bool:
    """Whether the policy loss in an actor's config is verl's; `register_policy_loss` takes names that are in use.

    Where the code stands tells: a wrapper takes over the name, and `__module__`, of what it wraps.
    """
    found = getattr(POLICY_LOSS_REGISTRY.get(loss_mode(actor)), "__globals__", {})
    return found.get("__name__") == core_algos.__name__


def update_traits(loss_function: Any, data: TensorDict) -> LossTraits:
    """What the whole loss of an update reads, KL term, entropy and normalisation included."""
    function = getattr(loss_function, "func", loss_function)
    if function is sft_loss:
        return _ALL_TOKENS
    config = ppo_config(loss_function)
    if config is not None:
        traits = policy_traits(config)
        if config.use_kl_loss or tu.get_non_tensor_data(data, "calculate_entropy", False):
            traits = replace(traits, without_advantage="none")
    elif function is value_loss and _VALUES_BY_STEP:
        traits, config = _ALL_TOKENS, loss_function.keywords["config"]
    else:
        return UNKNOWN
    counts_own_rows = tu.get_non_tensor_data(data, "global_batch_size", None) is None
    counts_longest_row = config.loss_agg_mode == "seq-mean-token-sum-norm" and config.loss_scale_factor is None
    if traits.normalises_by == "step" and (counts_own_rows or counts_longest_row):
        traits = replace(traits, normalises_by="micro_batch")
    return traits
