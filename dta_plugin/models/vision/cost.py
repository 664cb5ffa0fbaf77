"""What a vision tower costs by what it sees: in forward FLOPs, two per multiply-add, as `ModelCost` counts the rest."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedModel

from dta_plugin.models.introspection import decoder_of
from dta_plugin.models.sizes import matrix_numbers
from dta_plugin.models.vision.support import text_model_of
from dta_plugin.models.vision.units import Unit
from dta_plugin.tree.time_model import Work

# Of what a pass forward and backward takes, the share of the forward pass.
_FORWARD = 1 / 3


# Looked at once per model: how many numbers multiply every patch, and every token, and the modules.
_towers: WeakKeyDictionary[PreTrainedModel, tuple[int, int, list[nn.Module]]] = WeakKeyDictionary()


def tower_work(model: PreTrainedModel, units: Iterable[Unit]) -> Work:
    """All that is not the language model, for these units. A tower that is not trained goes forward only."""
    vision = model.config.vision_config
    if model not in _towers:
        language = set(text_model_of(model).modules())
        tower = [module for module in decoder_of(model).modules() if module not in language]
        _towers[model] = *_matrices(tower), tower
    on_patches, on_tokens, tower = _towers[model]
    is_trained = any(p.requires_grad for module in tower for p in module.parameters(recurse=False))
    share = 1.0 if is_trained else _FORWARD
    sizes = [(_patches(unit, vision), unit.tokens) for unit in units]
    patches, tokens = (sum(column) for column in zip(*sizes, strict=True))
    pairs = sum(count * _visible(count, vision) for count, _ in sizes)
    width = _number(vision, "hidden_size", "embed_dim")
    linear = 2.0 * (on_patches * patches + on_tokens * tokens)
    return Work(0.0, share * linear, share * 4.0 * width * pairs, 0.0)


def _matrices(modules: Sequence[nn.Module]) -> tuple[int, int]:
    """How many numbers multiply every patch, those of convolutions and layers; and every token, those behind them."""
    lists = [module for module in modules if isinstance(module, nn.ModuleList)]
    layers = max(lists, key=len, default=nn.ModuleList())
    inside = {*layers.modules(), *(module for module in modules if isinstance(module, nn.modules.conv._ConvNd))}
    tables = [module for module in modules if isinstance(module, nn.Embedding)]
    behind = [module for module in modules if module not in inside and module not in tables]
    return matrix_numbers(module for module in inside if module not in tables), matrix_numbers(behind)


def _patches(unit: Unit, vision: Any) -> int:
    """How many patches of an image the tower sees."""
    if "image_grid_thw" in unit.inputs:
        return int(unit.inputs["image_grid_thw"].prod())
    pixels = unit.inputs["pixel_values"]
    if pixels.ndim == 3:  # patches already
        return pixels.shape[0] * pixels.shape[1]
    *images, _, height, width = pixels.shape
    side = vision.patch_size if isinstance(vision.patch_size, int) else vision.patch_size[0]
    return math.prod(images) * (height // side) * (width // side)


def _visible(patches: int, vision: Any) -> float:
    """Patches that one patch attends to, summed over layers; some towers look at windows in most of theirs."""
    layers = _number(vision, "depth", "num_hidden_layers")
    full, window = getattr(vision, "fullatt_block_indexes", None), getattr(vision, "window_size", None)
    if not full or not window:
        return float(layers * patches)
    inside = min(patches, (window // vision.patch_size) ** 2)
    return float(len(full) * patches + (layers - len(full)) * inside)


def _number(vision: Any, *names: str) -> int:
    return next(value for name in names if isinstance(value := getattr(vision, name, None), int))
