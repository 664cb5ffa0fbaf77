"""Noise that depends on the row it is added to: checked here for every trainer, online and offline.

A tree, or a batch without what its rows share, has other rows than the trainer made, and so would have other noise.
"""

from __future__ import annotations

from dta_plugin.adapters.trl.protocols import TrainerLike
from dta_plugin.models.introspection import causal_lm


def noise_obstacle(trainer: TrainerLike) -> str | None:
    """What adds such noise in a trainer's model, with the remedy, or None. NEFTune, by config or on the model."""
    embeddings = causal_lm(trainer.model).get_input_embeddings()
    for owner in (trainer.args, trainer, embeddings):
        alpha = getattr(owner, "neftune_noise_alpha", None)
        if alpha:
            return (
                f"neftune_noise_alpha={alpha} adds noise that depends on the length of a row, and a tree has other "
                "rows; set neftune_noise_alpha=None"
            )
    return None
