"""A padded batch as a prefix tree, and what the tree computes as a padded batch again.

`PaddedBatch` finds the rows of a model call that can be merged, or says why the call cannot be. `spread` copies the
value of every tree token to all rows that contain it; backward, the gradients of the copies are summed in float32 (in
float64 for float64 models), row after row: no order of atomics, the same bits every time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from dta_plugin.decline import Decline
from dta_plugin.dtypes import accumulation_dtype
from dta_plugin.execution.probing.forest import Forest, image_forest
from dta_plugin.models.vision.batch_images import BatchImages, TreeImages
from dta_plugin.models.vision.units import ImageInputs
from dta_plugin.sharing.images import image_arguments, images_of_rows, known_kinds
from dta_plugin.tree.trie import PrefixTree

# Arguments of a decoder that say nothing about single tokens, whatever their type.
_OF_THE_CALL = {"num_items_in_batch", "use_cache", "return_dict", "output_router_logits"}
_ROWS = {"input_ids", "attention_mask", "position_ids"}
# Columns of a data set that a trainer's loss reads and its model is handed all the same: margins of preference pairs.
OF_THE_LOSS = {"margin"}
_OWN_PATH = {
    "past_key_values": "it reads cached keys and values",
    "inputs_embeds": "it gives embeddings in place of token ids",
    "output_attentions": "it asks for attention weights",
    "output_hidden_states": "it asks for the hidden states of every layer",
}


@dataclass(frozen=True, slots=True, eq=False)
class PaddedBatch:
    """Rows of a padded batch [B, L], left or right padded, merged.

    index: int64 [B, L] layout index of every token, -1 at padding. spans: [B] first and last + 1 real position. images:
    those of the rows, if they have any; image_rows: the same, sequence by sequence of the tree.
    """

    tree: PrefixTree
    index: torch.Tensor
    spans: list[tuple[int, int]]
    images: TreeImages | None = None
    image_rows: list[ImageInputs | None] | None = None

    @classmethod
    def from_arguments(
        cls, arguments: Mapping[str, Any], decoder: PreTrainedModel | None = None
    ) -> PaddedBatch | Decline:
        """arguments: of a decoder's call, by name. decoder: for those that may have images.

        Returns why the call takes the model's own path, if anything keeps it from being a tree.
        """
        inputs = {} if decoder is None else image_arguments(decoder, arguments)
        kinds = set() if decoder is None else known_kinds(decoder, arguments, has_images=bool(inputs))
        obstacle = _merge_obstacle(arguments, {*inputs}, kinds)
        if obstacle is not None:
            return Decline(obstacle)
        ids, mask = arguments["input_ids"].cpu().numpy(), arguments.get("attention_mask")
        real = np.ones(ids.shape, dtype=bool) if mask is None else mask.bool().cpu().numpy()
        counts = real.sum(axis=1)
        starts = real.argmax(axis=1)
        spans = [(int(start), int(start + count)) for start, count in zip(starts, counts, strict=True)]
        if not counts.any():
            return Decline("every token of it is masked")
        if not all(real[row, start:stop].all() for row, (start, stop) in enumerate(spans)):
            return Decline("its attention mask has holes")
        if not _counts_up(arguments.get("position_ids"), real):
            return Decline("its position ids do not count up along the rows: packed sequences")
        rows = [ids[row, a:b] for row, (a, b) in enumerate(spans) if b > a]
        images: BatchImages | None = None
        if inputs and decoder is not None:
            images = BatchImages.from_rows(decoder, rows, images_of_rows(decoder, inputs, rows))
            tree, tree_images = images.merged()
        else:
            tree, tree_images = PrefixTree.from_sequences(rows), None
        index = np.full(ids.shape, -1, dtype=np.int64)
        index[real] = tree.paths  # both go row by row
        on_device = torch.from_numpy(index).to(arguments["input_ids"].device)
        return cls(tree, on_device, spans, tree_images, None if images is None else images.rows)

    def forest(self, decoder: PreTrainedModel) -> Forest:
        """What a decoder is probed with before images of such batches come into trees."""
        sequences = [self.tree.tokens[self.tree.path(index)] for index in range(self.tree.num_sequences)]
        return image_forest(decoder, sequences, self.image_rows or [])


def _merge_obstacle(arguments: Mapping[str, Any], of_images: set[str], of_tokens: set[str]) -> str | None:
    """of_images: arguments that belong to images. of_tokens: those that say of every token what its id says, too."""
    for name, obstacle in _OWN_PATH.items():
        if arguments.get(name) is not None and arguments[name] is not False:
            return obstacle
    ids, mask = arguments.get("input_ids"), arguments.get("attention_mask")
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.shape[0] < 2 or ids.shape[1] == 0:
        return "it has no second row of token ids to share anything with"
    if of_images and arguments.get("position_ids") is not None:
        return "it has images, and positions of its own"
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.shape != ids.shape):
        return "its attention mask is not one of padding, a value per token"
    if arguments.get("use_cache"):
        return "it asks for a cache of keys and values"
    if arguments.get("return_dict") is False:
        return "it asks for a tuple"
    if arguments.get("is_causal") is False:
        return "it attends in both directions"
    known = _ROWS | _OF_THE_CALL | OF_THE_LOSS | of_images | of_tokens
    for name, value in arguments.items():
        if name not in known and isinstance(value, torch.Tensor) and value.ndim:
            return f"it has an argument that may differ by row or token, {name}"
    return None


def _counts_up(positions: torch.Tensor | None, real: np.ndarray) -> bool:
    """Whether the positions, [B, L] or [1, L], grow by one per real token: rotary positions depend on nothing else."""
    if positions is None:
        return True
    if positions.ndim != 2 or positions.shape[1] != real.shape[1] or positions.shape[0] not in (1, len(real)):
        return False
    steps = np.broadcast_to(np.diff(positions.cpu().numpy(), axis=1), (len(real), real.shape[1] - 1))
    return bool((steps == 1)[real[:, 1:] & real[:, :-1]].all())


def spread(values: torch.Tensor, batch: PaddedBatch) -> torch.Tensor:
    """Values [T, ...] of the tree's tokens -> [B, L, ...] of the batch's, 0 at padding; differentiable."""
    return _Spread.apply(values, batch.index.to(values.device), batch.spans)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, index: torch.Tensor, spans: list[tuple[int, int]]):
        ctx.save_for_backward(index)
        ctx.spans, ctx.tokens = spans, len(values)
        copies = values.index_select(0, index.clamp(min=0).flatten()).view(*index.shape, *values.shape[1:])
        return copies.masked_fill_((index < 0).view(*index.shape, *[1] * (values.ndim - 1)), 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient):
        (index,) = ctx.saved_tensors
        wide = accumulation_dtype(gradient.dtype)
        total = gradient.new_zeros(ctx.tokens, *gradient.shape[2:], dtype=wide)
        for row, (start, stop) in enumerate(ctx.spans):  # a row has no token twice
            total.index_add_(0, index[row, start:stop], gradient[row, start:stop].to(wide))
        return total.to(gradient.dtype), None, None
