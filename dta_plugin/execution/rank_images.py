"""Images of ranks that train together: a rank without any has its tower run along with those of the others.

Towers whose weights are sharded gather them from all ranks, and gradients are awaited from all. So where one rank has
images, the tower of every other sees a blank one, whose features go nowhere: they get a gradient of zero. So it is with
trees, and where the model's own path runs.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import torch
from torch import nn

from dta_plugin.execution.ranks import DUMMY_SEQUENCE, gathered, is_collective, is_fsdp1
from dta_plugin.models.introspection import causal_lm
from dta_plugin.models.vision.batch_images import TreeImages, has_own_positions, position_axes
from dta_plugin.models.vision.support import images_obstacle
from dta_plugin.models.vision.units import ImageInputs, Unit
from dta_plugin.tree.trie import PrefixTree, TokenSequence

Row: TypeAlias = tuple[TokenSequence, "ImageInputs | None"]
# Per input, what a blank image is made of: integers as they are, of pixels the shape and dtype.
_Form: TypeAlias = dict[str, "torch.Tensor | tuple[torch.Size, torch.dtype]"]


def along_with_others(
    model: nn.Module, tree: PrefixTree, images: TreeImages | None, obstacle: str | None
) -> tuple[TreeImages | None, str | None]:
    """The images of this rank's tree; a blank one where only other ranks have any; None where none has.

    obstacle: why this rank's rows cannot be a tree; returned is that of any rank. All ranks that train together must
    call it.
    """
    if not (is_collective(model) or is_fsdp1(model)) or images_obstacle(causal_lm(model)) is not None:
        return images, obstacle
    unit = None if images is None else min(images.units, key=lambda unit: unit.tokens)
    ranks = gathered(model, (None if unit is None else (_form(unit.inputs), unit.tokens), obstacle))
    obstacle = obstacle or next((f"on another rank, {other}" for _, other in ranks if other is not None), None)
    found = next((found for found, _ in ranks if found is not None), None)
    if images is not None or found is None or obstacle is not None:
        return images, obstacle
    base = causal_lm(model)
    positions = np.stack([tree.depth] * position_axes(base)) if has_own_positions(base) else None
    feature = np.full(tree.tree_tokens, -1, dtype=np.int64)
    return TreeImages([Unit(_blank(found[0]), found[1])], feature, positions), None


def dense_turns(model: nn.Module, rows: list[Row]) -> list[tuple[int | None, Row]]:
    """Rows in the order in which the model's own path runs them, with their places; None for those of no use.

    Of these there are as many as it takes for all ranks to call the model equally often, with and without images. All
    ranks that train together must call it.
    """
    if not is_collective(model):
        return list(enumerate(rows))
    parts = [
        [(place, row) for place, row in enumerate(rows) if (row[1] is None) == is_text] for is_text in (False, True)
    ]
    shortest = min((row for _, row in parts[0]), key=lambda row: len(row[0]), default=None)
    sample = None if shortest is None or shortest[1] is None else (shortest[0], _form(shortest[1]))
    ranks = gathered(model, (len(parts[0]), len(parts[1]), sample))
    found = next((sample for *_, sample in ranks if sample is not None), None)
    dummies: list[Row] = [(DUMMY_SEQUENCE, None), (DUMMY_SEQUENCE, None)]
    if found is not None:
        dummies[0] = found[0], _blank(found[1])
    turns: list[tuple[int | None, Row]] = []
    for part, dummy, counts in zip(parts, dummies, zip(*(counts for *counts, _ in ranks), strict=True), strict=True):
        turns += [*part, *[(None, dummy)] * (max(counts) - len(part))]
    return turns


def _form(inputs: ImageInputs) -> _Form:
    return {
        name: (value.shape, value.dtype) if value.is_floating_point() else value.cpu() for name, value in inputs.items()
    }


def _blank(form: _Form) -> dict[str, torch.Tensor]:
    return {
        name: value if isinstance(value, torch.Tensor) else torch.ones(value[0], dtype=value[1])
        for name, value in form.items()
    }
