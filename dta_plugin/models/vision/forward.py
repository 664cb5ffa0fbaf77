"""The decoder's call with images: the tower sees every distinct image once, and the language model goes on as a tree.

The outer model's forward is not run: it would hand the tree to the tower, whose attention stays stock here, and would
ask for the images again for every run of placeholders. What it does is done by hand, for all families alike: features
take the place of placeholders, and go into the first layers again where the model asks for that (deepstack); tables of
embeddings per layer are read at the padding token there. Placeholders get what they stand for by index, in the backward
pass of which the gradients of all copies are summed.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from dta_plugin.errors import InvalidInputError, UnsupportedError
from dta_plugin.models.introspection import decoder_of
from dta_plugin.models.layers import forward_has
from dta_plugin.models.vision.batch_images import TreeImages
from dta_plugin.models.vision.dense import EXPERT_KINDS, expert_kinds
from dta_plugin.models.vision.support import text_model_of
from dta_plugin.models.vision.units import Unit, stacked

# Inputs that are counts, not tensors.
_COUNTS = ("num_local_patches",)
# How language models call features for several layers.
_LEVELS = ("deepstack_visual_embeds", "deepstack_features")


def image_features(model: PreTrainedModel, units: Sequence[Unit], device: torch.device) -> list[torch.Tensor]:
    """Features [F, H] of all units, one after the other, and those for each of the first layers (deepstack), if any.

    One call of the tower. model: the causal LM inside all wrappers. device: where it computes.

    Raises:
        InvalidInputError: a unit with another number of features than it has placeholders.
        UnsupportedError: features for several layers, which the language model does not take.
    """
    decoder: Any = decoder_of(model)
    inputs: dict[str, Any] = {name: value.to(device) for name, value in stacked(units).items()}
    inputs |= {name: inputs[name].tolist() for name in _COUNTS if name in inputs}
    output = decoder.get_image_features(**inputs)
    first, levels = _parts(output)
    if first is None:
        first = _projected(decoder, output.last_hidden_state)
    if levels and not any(name in inspect.signature(text_model_of(model).forward).parameters for name in _LEVELS):
        raise UnsupportedError(
            f"The vision tower of {type(model).__name__} makes features for several layers, which its language model "
            "does not take; use another family for images."
        )
    features = [_flat(values, units, model) for values in (first, *levels)]
    indicators = getattr(output, "visual_indicator_features", None)
    return features if indicators is None else [torch.cat([features[0], indicators.to(features[0])]), *features[1:]]


def decoder_call(
    model: PreTrainedModel, inputs: dict[str, Any], images: TreeImages, features: Sequence[torch.Tensor]
) -> Any:
    """What the decoder returns for a packed row with images. Arguments as of `embedded_inputs`."""
    return text_model_of(model)(**embedded_inputs(model, inputs, images, features))


def embedded_inputs(
    model: PreTrainedModel, inputs: dict[str, Any], images: TreeImages, features: Sequence[torch.Tensor]
) -> dict[str, Any]:
    """Keyword arguments of the language model for a packed row with images.

    Args:
        model: the causal LM inside all wrappers, or its decoder.
        inputs: keyword arguments for a row of text, see `row_inputs`.
        images: of the same tokens.
        features: as `image_features` returns them for the images' units.
    """
    text: Any = text_model_of(model)
    inputs = dict(inputs)
    ids = inputs.pop("input_ids")
    if EXPERT_KINDS in inspect.signature(text.forward).parameters:
        inputs[EXPERT_KINDS] = expert_kinds(model, ids)
    places, rows = images.places(ids.device)
    padding = getattr(text.config, "pad_token_id", None) or 0
    ids = ids.index_fill(1, places, padding)
    embeddings = model.get_input_embeddings()(ids)
    own = features[0].index_select(0, rows).to(embeddings.dtype)
    if getattr(text.config, "hidden_size_per_layer_input", None):
        inputs["per_layer_inputs"] = text.get_per_layer_inputs(ids, embeddings)
    if len(features) > 1:
        is_image = torch.zeros_like(ids, dtype=torch.bool).index_fill(1, places, True)
        levels = [level.index_select(0, rows) for level in features[1:]]
        inputs |= _for_layers(model, is_image, levels)
    position_ids = images.position_ids(ids.device)
    if position_ids is not None:
        inputs["position_ids"] = position_ids
    return inputs | {"inputs_embeds": embeddings.index_copy(1, places, own[None])}


def _for_layers(model: PreTrainedModel, is_image: torch.Tensor, levels: list[torch.Tensor]) -> dict[str, Any]:
    """How the language model takes features for its layers: the first ones, or those that the config names."""
    if "deepstack_visual_embeds" in inspect.signature(text_model_of(model).forward).parameters:
        return {"visual_pos_masks": is_image, "deepstack_visual_embeds": levels}
    layers = [*(layer for _, layer in model.config.deepstack_layer_map), *model.config.spatial_target_layers]
    return {"vision_mask": is_image[..., None], "deepstack_features": dict(zip(layers, levels, strict=False))}


def _parts(output: Any) -> tuple[Any, list[Any]]:
    """Features, if any, and those for other layers (deepstack), of what families and releases return."""
    if isinstance(output, torch.Tensor) or (isinstance(output, (list, tuple)) and isinstance(output[0], torch.Tensor)):
        return output, []
    if isinstance(output, tuple):  # before transformers 5
        return output[0], list(output[1])
    levels = list(getattr(output, "deepstack_features", None) or [])
    if levels and isinstance(levels[0], tuple) and isinstance(levels[0][0], int):  # and nothing among the embeddings
        levels = [values for _, values in levels]
        return [torch.zeros_like(values) for values in levels[0]], levels
    return getattr(output, "pooler_output", None), levels


def _projected(decoder: Any, states: torch.Tensor) -> torch.Tensor:
    """Features out of the tower's hidden states, where the decoder's own forward makes them."""
    if not forward_has(decoder, "multi_modal_projector"):
        return states
    projected: torch.Tensor = decoder.multi_modal_projector(states)
    return projected


def _flat(values: Any, units: Sequence[Unit], model: PreTrainedModel) -> torch.Tensor:
    """[F, H] out of one tensor per unit, [units, n, H] or [F, H]; checked against the placeholders of each unit."""
    expected = [unit.tokens for unit in units]
    if isinstance(values, torch.Tensor):
        lengths = [values.shape[1]] * len(values) if values.ndim == 3 else expected
        flat = values.reshape(-1, values.shape[-1])
    else:
        lengths, flat = [len(value) for value in values], torch.cat(list(values))
    if lengths != expected or len(flat) != sum(expected):
        raise InvalidInputError(
            f"The vision tower of {type(model).__name__} made {lengths} features of {len(units)} images whose "
            f"placeholders number {expected}. Expected as many; pass what the model's own processor returned."
        )
    return flat
