"""Which tokens an update runs on: those that TRL's loss reads, and of these the ones that a selection draws.

`pruned` leaves out, once per generation batch, what cannot change the gradient. `draw_micro_step` draws for one
micro-step; a buffer that is used for several optimizer passes is drawn from anew in each.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import nn
from trl import GRPOTrainer

from dta_plugin.adapters.trl.generation_batch import Inputs, RowTable, row_obstacle
from dta_plugin.adapters.trl.image_rows import image_rows
from dta_plugin.adapters.trl.losses import LOSS_TYPES, counts_padding, trainer_traits
from dta_plugin.adapters.trl.origin import foreign_reader, unknown_terms
from dta_plugin.adapters.trl.protocols import GRPOLike
from dta_plugin.adapters.trl.token_weights import is_weighted, loss_mask, reweighted
from dta_plugin.errors import InvalidInputError
from dta_plugin.token_selection.select import TokenSelection
from dta_plugin.training.batch import RowBatch
from dta_plugin.training.losses import tokens_read
from dta_plugin.training.tokens import draw_tokens


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
    if not trainer_traits(trainer).is_token_sum:
        usable = ", ".join(name for name, traits in LOSS_TYPES.items() if traits.is_token_sum)
        return f"loss_type={trainer.loss_type!r}, which is no sum over tokens; use one of {usable}"
    if getattr(trainer, "off_policy_mask_threshold", None) is not None:
        return "off_policy_mask_threshold, which judges whole sequences; leave it out"
    if trainer.top_entropy_quantile < 1.0:
        return f"top_entropy_quantile={trainer.top_entropy_quantile}, which ranks all tokens; use 1.0"
    if getattr(trainer, "use_adaptive_entropy", False):
        return "adaptive entropy control, which compares all tokens' entropy with a target; use a fixed entropy_coef"
    if getattr(trainer, "aux_loss_enabled", False):
        return "the router loss, which is no sum over tokens; set router_aux_loss_coef=0"
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
    if row_obstacle(buffer) or counts_padding(trainer) or _has_gaps(buffer):
        return buffer
    table = RowTable.from_batches(buffer)
    inputs: Inputs = table.per_row | table.constant
    reads = tokens_read(loss_mask(inputs) != 0, inputs["advantages"], trainer_traits(trainer))
    if torch.equal(reads, inputs["completion_mask"] != 0):
        return buffer
    thinned = reweighted(inputs, reads.float())
    if "old_logps" in inputs:  # RLOO's, of whole sequences
        thinned["old_logps"] = inputs["old_logps"].masked_fill(~reads.any(dim=1), 0)
    per_row = {key: value for key, value in thinned.items() if key not in table.constant}
    return replace(table, per_row=per_row).batches()


def _has_gaps(buffer: list[Inputs]) -> bool:
    """Whether a subclass hides tokens within completions from the model: weights could not say so."""
    masks = (inputs["completion_mask"] != 0 for inputs in buffer if not is_weighted(inputs))
    return any(bool((mask[:, 1:] & ~mask[:, :-1]).any()) for mask in masks)


@dataclass(frozen=True, slots=True, eq=False)
class MicroStepInputs:
    """What one micro-step gets. metrics: of what was drawn (see `DrawnTokens.metrics`)."""

    inputs: Inputs
    metrics: dict[str, float] = field(default_factory=dict)


def draw_micro_step(
    inputs: Inputs, model: nn.Module, selection: TokenSelection, *, seed: int, step: int, rank: int
) -> MicroStepInputs:
    """Drawn by the numbers given; inputs bit by bit as they were if nothing is left out. model: the trainer's."""
    groups = _prompts(inputs, model).groups
    drawn = draw_tokens(selection, loss_mask(inputs) != 0, groups, seed=seed, step=step, rank=rank)
    return MicroStepInputs(inputs if drawn.has_all else reweighted(inputs, drawn.weights), drawn.metrics)


def _prompts(inputs: Inputs, model: nn.Module) -> RowBatch:
    """Of all rows, with what their images show."""
    prompts = RowBatch.from_padded(inputs["prompt_ids"], inputs["prompt_mask"], 0)
    images = image_rows(model, inputs, torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1))
    return prompts if images is None else replace(prompts, sequences=images.by_content(prompts.sequences))


def check_selection(trainer: GRPOLike, buffer: list[Inputs], selection: TokenSelection) -> None:
    """Raises InvalidInputError where the trainer's loss cannot be estimated from a subset of tokens."""
    obstacle = selection_obstacle(trainer, buffer)
    if obstacle is not None:
        raise InvalidInputError(f"token_selection={selection.scheme!r} with {obstacle}, or token_selection='all'.")
