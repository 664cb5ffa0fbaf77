"""Faults planted into the tree path, of the kinds that a probe or a verification must find and place."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from dta_plugin.attention.mask import TreeMask
from dta_plugin.execution import packed
from dta_plugin.execution.streaming.kv_arena import ChunkMask
from dta_plugin.models import introspection as model


def siblings_seen_in_layer(patch: pytest.MonkeyPatch, layer: int) -> None:
    """In one layer every earlier token of the row is seen, whatever branch it is on."""

    def plant(kind: type[TreeMask]) -> None:
        at_layer = kind.at_layer

        def opened(self: TreeMask, index: int) -> TreeMask:
            mask = at_layer(self, index)
            if index != layer:
                return mask
            mask = copy.copy(mask)
            exits, depth = mask.host()
            mask.exit, mask._host, mask._plans = (
                torch.full_like(mask.exit, len(mask)),
                (exits * 0 + len(mask), depth),
                {},
            )
            return mask

        patch.setattr(kind, "at_layer", opened)

    plant(TreeMask)
    plant(ChunkMask)


def head_read_with_scale(patch: pytest.MonkeyPatch, scale: float) -> None:
    """A logit scale that the model does not apply."""
    patch.setattr(model, "_logit_scale", lambda _: scale)


def one_token_off(patch: pytest.MonkeyPatch, nats: float) -> None:
    """One log-prob of every call is off."""
    scoring = packed.edge_logprobs

    def wrong(*args: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        logprobs, entropies = scoring(*args)
        shift = torch.zeros_like(logprobs)
        shift[len(shift) // 2] = nats
        return logprobs + shift, entropies

    patch.setattr(packed, "edge_logprobs", wrong)


def gradient_of_layer(layer: nn.Module, factor: float) -> None:
    """In trees the gradient of a layer's output is multiplied: wrong from this layer down, values are right."""

    def scale(_: nn.Module, __: Any, kwargs: dict[str, Any], output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        if kwargs.get("dta_tree") is not None and states.requires_grad:
            states.register_hook(lambda gradient: factor * gradient)

    layer.register_forward_hook(scale, with_kwargs=True)
