"""TRL's losses as traits: which rows of a window may go to other micro-batches, and which tokens need not run."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version

from packaging.version import Version
from trl import RLOOTrainer

from dta_plugin.training.losses import LossTraits, traits_of

_TOKEN_SUM = LossTraits(sums_over="tokens", without_advantage="tokens", normalises_by="step")
LOSS_TYPES = {
    **dict.fromkeys(("grpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo"), _TOKEN_SUM),
    "bnpo": replace(_TOKEN_SUM, normalises_by="micro_batch"),
    "vespo": LossTraits(sums_over="rows", normalises_by="step"),
}
# RLOO's ratio is one of whole sequences, and its loss a mean over rows.
_RLOO = LossTraits(sums_over="rows", without_advantage="tokens", normalises_by="step")
LEVELS = ("token", "sequence")


def trainer_traits(trainer: object) -> LossTraits:
    """What the whole loss of a GRPO or RLOO trainer reads, as far as it is TRL's own: see `origin` for whose it is."""
    is_rloo = isinstance(trainer, RLOOTrainer)
    traits = _RLOO if is_rloo else traits_of(getattr(trainer, "loss_type", ""), LOSS_TYPES)
    if counts_padding(trainer):
        traits = replace(traits, normalises_by="columns")
    reads_more = getattr(trainer, "aux_loss_enabled", False) or (
        not is_rloo
        and (
            getattr(trainer, "beta", 0.0) != 0.0
            or getattr(trainer, "top_entropy_quantile", 1.0) < 1.0
            or getattr(trainer, "_entropy_bonus_enabled", False)
        )
    )
    return replace(traits, without_advantage="none") if reads_more else traits


def counts_padding(trainer: object) -> bool:
    """Whether the loss is a mean over padded columns as well, whose number must stay: luspo before TRL 1.10."""
    return getattr(trainer, "loss_type", None) == "luspo" and Version(version("trl")) < Version("1.10.0")


def composition_obstacle(trainer: object) -> str | None:
    """Why a row's gradient depends on which rows share its micro-batch, or None if it does not."""
    if trainer_traits(trainer).normalises_by == "micro_batch":
        return f"loss_type={getattr(trainer, 'loss_type', None)!r} normalises over each micro-batch"
    if getattr(trainer, "top_entropy_quantile", 1.0) < 1.0:
        return "top_entropy_quantile is taken over each micro-batch"
    if getattr(trainer, "_entropy_bonus_enabled", False):
        return "the entropy bonus is a mean over each micro-batch"
    if getattr(trainer, "aux_loss_enabled", False):
        return "the router loss is computed over each micro-batch"
    return None
