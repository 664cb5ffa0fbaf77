"""What stands in front of a model's attention."""

from __future__ import annotations

from transformers import PreTrainedModel

from dta_plugin.models.attention_registry import Dispatcher, _places


def is_installed(model: PreTrainedModel) -> bool:
    """Whether a dispatcher is in front of all attention of the language model, for this model."""
    found = [entries[key] for entries, key in _places(model)]
    return bool(found) and all(isinstance(entry, Dispatcher) and model in entry.models for entry in found)
