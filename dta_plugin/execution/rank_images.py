"""Images of ranks that train together: a rank without any has its tower run along with those of the others.

Towers whose weights are sharded gather them from all ranks, and gradients are awaited from all. So where one rank has
images, the tower of every other sees a blank one, whose features go nowhere: they get a gradient of zero.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import torch
from torch import nn

from dta_plugin.execution.ranks import gathered, is_collective, is_fsdp1
from dta_plugin.models.introspection import causal_lm
from dta_plugin.models.vision.batch_images import TreeImages, has_own_positions, position_axes
from dta_plugin.models.vision.support import images_obstacle
from dta_plugin.models.vision.units import Unit
from dta_plugin.tree.trie import PrefixTree

# Per input of a unit, what a blank one is made of: integers as they are, of pixels the shape and dtype.
_Form: TypeAlias = dict[str, "torch.Tensor | tuple[torch.Size, torch.dtype]"]


def along_with_others(model: nn.Module, tree: PrefixTree, images: TreeImages | None) -> TreeImages | None:
    """The images of this rank's tree; a blank one where only other ranks have any; None where none has.

    All ranks that train together must call it.
    """
    if not (is_collective(model) or is_fsdp1(model)) or images_obstacle(causal_lm(model)) is not None:
        return images
    forms = gathered(model, None if images is None else _form(min(images.units, key=lambda unit: unit.tokens)))
    form = next((form for form in forms if form is not None), None)
    if images is not None or form is None:
        return images
    inputs = {
        name: value if isinstance(value, torch.Tensor) else torch.ones(value[0], dtype=value[1])
        for name, value in form[0].items()
    }
    base = causal_lm(model)
    positions = np.stack([tree.depth] * position_axes(base)) if has_own_positions(base) else None
    return TreeImages([Unit(inputs, form[1])], np.full(tree.tree_tokens, -1, dtype=np.int64), positions)


def _form(unit: Unit) -> tuple[_Form, int]:
    """And how many placeholders it fills."""
    return {
        name: (value.shape, value.dtype) if value.is_floating_point() else value.cpu()
        for name, value in unit.inputs.items()
    }, unit.tokens
