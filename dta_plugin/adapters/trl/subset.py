"""Which tokens an update runs on: those that TRL's loss reads, and of these the ones that a selection draws.

`pruned` leaves out, once per generation batch, what cannot change the gradient. `HandedOut.of` draws for one
micro-step; a buffer that is used for several optimizer passes is drawn from anew in each.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from trl import GRPOTrainer, RLOOTrainer

from dta_plugin.adapters.trl.buffer import Inputs, Rows, has_images
from dta_plugin.adapters.trl.origin import foreign_reader, unknown_terms
from dta_plugin.adapters.trl.protocols import GRPOLike
from dta_plugin.adapters.trl.version import counts_padding
from dta_plugin.adapters.trl.weights import is_weighted, loss_mask, reweighted
from dta_plugin.errors import InvalidInputError
from dta_plugin.token_selection.select import TokenSelection, draw

_TOKEN_LOCAL = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo")
# Losses in which every term of a token has its advantage as a factor.
_NEED_ADVANTAGE = _TOKEN_LOCAL


def selection_obstacle(trainer: GRPOLike, buffer: list[Inputs]) -> str | None:
    """Why a loss on a subset of tokens would not be that of all tokens on average; names the setting and the remedy."""
    if not isinstance(trainer, GRPOTrainer):
        return f"{type(trainer).__name__}, whose ratio is one of whole sequences; use GRPOTrainer"
    unknown = foreign_reader(trainer) or unknown_terms(trainer)
    if unknown is not None:
        return f"a loss that may not be a sum over tokens, since {unknown}; use GRPOTrainer's own"
    level = getattr(trainer, "importance_sampling_level", "token")
    if level != "token":
        return f"importance_sampling_level={level!r}, which is no sum over tokens; use 'token'"
    if counts_padding(trainer):
        return "loss_type='luspo', a mean over padding, too, before TRL 1.10; use another, or update TRL"
    if trainer.loss_type not in _TOKEN_LOCAL:
        return f"loss_type={trainer.loss_type!r}, which is no sum over tokens; use one of {', '.join(_TOKEN_LOCAL)}"
    if getattr(trainer, "off_policy_mask_threshold", None) is not None:
        return "off_policy_mask_threshold, which judges whole sequences; leave it out"
    if trainer.top_entropy_quantile < 1.0:
        return f"top_entropy_quantile={trainer.top_entropy_quantile}, which ranks all tokens; use 1.0"
    if getattr(trainer, "use_adaptive_entropy", False):
        return "adaptive entropy control, which compares all tokens' entropy with a target; use a fixed entropy_coef"
    if getattr(trainer, "aux_loss_enabled", False):
        return "the router loss, which is no sum over tokens; set router_aux_loss_coef=0"
    if has_images(buffer):
        return "images; train on text"
    if _has_gaps(buffer):
        return f"a completion_mask of {type(trainer).__name__} with gaps; mask such tokens by tool_mask"
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    if getattr(parallelism, "non_data_parallel_size", 1) > 1:
        return "tensor, context or sequence parallelism, where ranks share rows; use data parallelism"
    return None


def pruned(trainer: GRPOLike, buffer: list[Inputs], forced: bool = False) -> list[Inputs]:
    """The micro-batches of a generation batch without the tokens whose log-probs no loss reads; as they were if none.

    forced: a loss of unknown terms is taken for TRL's; but what reads the inputs must be the plugin's own hook.

    These are masked tokens, and rows with advantage 0 where the loss has no other term. All but the metric `entropy`
    stay what they were; that one is then of the tokens that run.
    """
    if (unknown_terms(trainer) and not forced) or foreign_reader(trainer):
        return buffer
    if has_images(buffer) or counts_padding(trainer) or _has_gaps(buffer):
        return buffer
    rows = Rows.of(buffer)
    inputs: Inputs = rows.per_row | rows.constant
    reads = loss_mask(inputs) != 0
    if _ignores_zero_advantages(trainer):
        advantages = inputs["advantages"]
        reads &= (advantages if advantages.ndim == 2 else advantages[:, None]) != 0
    if torch.equal(reads, inputs["completion_mask"] != 0):
        return buffer
    thinned = reweighted(inputs, reads.float())
    if "old_logps" in inputs:  # RLOO's, of whole sequences
        thinned["old_logps"] = inputs["old_logps"].masked_fill(~reads.any(dim=1), 0)
    per_row = {key: value for key, value in thinned.items() if key not in rows.constant}
    return Rows(per_row, rows.constant, rows.sizes).batches()


def _has_gaps(buffer: list[Inputs]) -> bool:
    """Whether a subclass hides tokens within completions from the model: weights could not say so."""
    masks = (inputs["completion_mask"] != 0 for inputs in buffer if not is_weighted(inputs))
    return any(bool((mask[:, 1:] & ~mask[:, :-1]).any()) for mask in masks)


def _ignores_zero_advantages(trainer: GRPOLike) -> bool:
    """Whether a row with advantage 0 adds nothing to the gradient, and nothing of its own to a metric but `entropy`."""
    if isinstance(trainer, RLOOTrainer):
        return not getattr(trainer, "aux_loss_enabled", False)
    return (
        trainer.beta == 0.0
        and trainer.loss_type in _NEED_ADVANTAGE
        and trainer.top_entropy_quantile >= 1.0
        and not getattr(trainer, "_entropy_bonus_enabled", False)
        and not getattr(trainer, "aux_loss_enabled", False)
    )


@dataclass(frozen=True, slots=True, eq=False)
class HandedOut:
    """One micro-step's inputs. statistics: of what was drawn (see `Drawn.statistics`)."""

    inputs: Inputs
    statistics: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, inputs: Inputs, selection: TokenSelection | None, seed: int, step: int, rank: int) -> HandedOut:
        """Drawn by the numbers given; all tokens if nothing is left out, bit by bit as they were."""
        if selection is None:
            return cls(inputs)
        mask = loss_mask(inputs)
        drawn = draw(selection, (mask != 0).cpu().numpy(), _groups(inputs), seed=seed, step=step, rank=rank)
        if not (drawn.weights[drawn.carries_loss] != 1.0).any():
            return cls(inputs, drawn.statistics())
        weights = torch.from_numpy(drawn.weights).to(mask.device, torch.float32)
        return cls(reweighted(inputs, weights), drawn.statistics())


def _groups(inputs: Inputs) -> list[int]:
    """Per row a number, the same for rows of one prompt."""
    _, groups = torch.unique(inputs["prompt_ids"] * inputs["prompt_mask"], dim=0, return_inverse=True)
    return groups.tolist()


def check_selection(trainer: GRPOLike, buffer: list[Inputs], selection: TokenSelection) -> None:
    """Raises InvalidInputError where the trainer's loss cannot be estimated from a subset of tokens."""
    obstacle = selection_obstacle(trainer, buffer)
    if obstacle is not None:
        raise InvalidInputError(f"token_selection={selection.scheme!r} with {obstacle}, or token_selection='all'.")
