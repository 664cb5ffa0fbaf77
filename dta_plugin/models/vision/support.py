"""Whether images of a model can come into a tree, and why not: what is looked at is the class's own code.

The way in (forward.py) does what the forward of nearly all image models does: features of images take the place of
placeholders among the embeddings, and the language model goes on. Where more happens, it is named here.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel

from dta_plugin.errors import UnsupportedError
from dta_plugin.models.introspection import decoder_of
from dta_plugin.models.vision.units import image_token_id

# Families whose forward does more with images than to put features in the place of placeholders.
_FAMILIES = {
    "gemma3n": "embeds ids of images and sound by tables of their own",
    "paligemma": "attends both ways within the whole prompt",
    "chameleon": "turns images into tokens of its vocabulary",
    "emu3": "turns images into tokens of its vocabulary",
    "molmo2": "attends both ways among all images, and adds features to what placeholders are embedded as",
}


# Looked at once per model: it takes a walk over all of its modules.
_obstacles: WeakKeyDictionary[PreTrainedModel, str | None] = WeakKeyDictionary()


def images_obstacle(model: PreTrainedModel) -> str | None:
    """Why images of this model cannot come into a tree ("what; remedy"), or None if they can."""
    if model not in _obstacles:
        _obstacles[model] = _found_obstacle(model)
    return _obstacles[model]


def _found_obstacle(model: PreTrainedModel) -> str | None:
    name, decoder = type(model).__name__, decoder_of(model)
    if model.config.model_type in _FAMILIES:
        return f"{name} {_FAMILIES[model.config.model_type]}; use another family for images"
    if any("cross" in type(module).__name__.lower() for module in text_model_of(model).modules()):
        return f"{name} attends to images by cross-attention; use another family for images"
    missing = [] if image_token_id(model) is not None else ["image token in its config"]
    missing += [] if hasattr(decoder, "get_image_features") else ["get_image_features"]
    if missing:
        return (
            f"{name} has no {', and no '.join(missing)}; use a vision-language model of transformers, loaded with "
            "AutoModelForImageTextToText"
        )
    if text_model_of(model) is decoder:
        return f"{name} has no language model apart from its images; use another family for images"
    return None


def check_images(model: PreTrainedModel) -> None:
    """Raises UnsupportedError where images cannot come into a tree."""
    reason = images_obstacle(model)
    if reason is not None:
        raise UnsupportedError(f"{reason}.")


def text_model_of(model: PreTrainedModel) -> PreTrainedModel:
    """The language model alone, that turns embeddings into hidden states; the whole decoder where there is no other."""
    found: Any = decoder_of(model).get_decoder()
    if not isinstance(found, PreTrainedModel):
        return decoder_of(model)
    return found if found.get_output_embeddings() is None else decoder_of(found)
