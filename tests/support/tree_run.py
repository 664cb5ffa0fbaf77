"""The package's result in the oracle's form, and the sabotages that every comparison must notice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import dta_plugin
from dta_plugin import TreeConfig, TreeLayout, TreeMask
from dta_plugin.attention import cpu
from dta_plugin.attention.cpu_plan import Piece
from dta_plugin.execution import packed
from dta_plugin.models.lm_head import LMHead
from dta_plugin.recurrent import plan
from tests.support.models import tiny_model
from tests.support.oracle import Result, Rows, Scored, functional, result_of

# Largest difference from the oracle in log-probs, entropies and (relative) gradients. float64 is free of transformers'
# float32 islands, see support/models.py, so that only the order of sums is left.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
STREAMED_FAMILIES = ("llama", "qwen2", "qwen3", "gemma3", "mistral")


@cache
def model_pair(family: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedModel]:
    """(for the oracle, for the tree): the same weights, and only the second one meets the package."""
    return tiny_model(family, dtype), tiny_model(family, dtype)


def bfloat16_and_its_truth(family: str, seed: int = 0) -> tuple[torch.nn.Module, torch.nn.Module, torch.nn.Module]:
    """(for the tree, for the oracle, float32 model with the same bfloat16 weights); rounding switches no expert."""
    every_expert = {"num_experts_per_tok": 4} if family in ("gpt_oss", "qwen3_moe") else {}
    models = [tiny_model(family, torch.bfloat16, seed, **every_expert) for _ in range(3)]
    return models[0], models[1], models[2].float()


def through_tree(
    model: torch.nn.Module,
    sequences: Sequence[Sequence[int]],
    scored: Scored | None = None,
    temperature: float = 1.0,
    config: TreeConfig | None = None,
    loss: Callable[[Rows, Rows], torch.Tensor] = functional,
    executor: str = "packed",
    images: Sequence[dict[str, torch.Tensor] | None] | None = None,
) -> Result:
    """What `sequence_logprobs` gives, with the gradients of the same functional as the oracle's.

    executor: who must have run it. images: as for `sequence_logprobs`.
    """
    out = dta_plugin.sequence_logprobs(
        model, sequences, config, temperature, return_entropy=True, scored=scored, images=images
    )
    assert out.entropies is not None
    assert out.report.executor == executor
    return result_of(model, out.logprobs, out.entropies, loss)


def make_siblings_visible(patch: pytest.MonkeyPatch) -> None:
    """Every earlier token of the layout is seen, whatever branch it is on; states run along the layout."""

    def open_mask(layout: TreeLayout, backend: str = "auto") -> TreeMask:
        return TreeMask(torch.full_like(layout.exit, len(layout.exit)), layout.depth, backend)

    patch.setattr(TreeMask, "from_layout", open_mask)
    carry_states_across_branches(patch)


def carry_states_across_branches(patch: pytest.MonkeyPatch) -> None:
    """Recurrent layers go along the layout, from each token to the next, whatever branch it is on."""
    patch.setattr(plan, "_parents", lambda depth: np.arange(-1, len(depth) - 1))


def use_layout_positions(patch: pytest.MonkeyPatch) -> None:
    """Position ids count along the layout and not along each sequence."""
    inputs = packed.model_inputs

    def wrong(layout: TreeLayout, mask: TreeMask) -> dict[str, object]:
        return inputs(layout, mask) | {"position_ids": torch.arange(len(mask))[None]}

    patch.setattr(packed, "model_inputs", wrong)


def drop_gradient_of_one_child(patch: pytest.MonkeyPatch) -> None:
    """The last child of the fork with most children gets no gradient through its edge; values stay right."""
    scoring = packed.edge_logprobs

    def dropping(
        hidden: torch.Tensor, head: LMHead, targets: torch.Tensor, row_of_edge: torch.Tensor, *rest: object
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        logprobs, entropies = scoring(hidden, head, targets, row_of_edge, *rest)  # type: ignore[arg-type]
        child = (row_of_edge == row_of_edge.mode().values).nonzero()[-1]
        return logprobs.index_copy(0, child, logprobs[child].detach()), entropies

    patch.setattr(packed, "edge_logprobs", dropping)


def drop_key_gradient_of_one_block(patch: pytest.MonkeyPatch) -> None:
    """One block of descendants does not give its gradient to the ancestors' keys and values; values stay right."""
    add = cpu._add

    def dropping(total: torch.Tensor, part: torch.Tensor, piece: Piece) -> None:
        if piece.first:
            add(total, part, piece)

    patch.setattr(cpu, "_add", dropping)
