"""Everything in a model that reads along a tree, attention and recurrent layers, made to do so where a call has one."""

from __future__ import annotations

from transformers import PreTrainedModel

from dta_plugin.models import attention_registry, indexers, recurrent_registry
from dta_plugin.models.layer_calls import LayerCall
from dta_plugin.models.recurrent_layers import mixers


def install(model: PreTrainedModel) -> None:
    """Whenever a call of the language model carries a tree, its layers go along it. Idempotent.

    Raises UnsupportedError for a model of which no layer can.
    """
    attention_registry.install(model, is_required=not mixers(model))
    recurrent_registry.install(model)
    indexers.install(model)


def uninstall(model: PreTrainedModel | None = None) -> None:
    """The model has no need of it any more; None: no model has. See `attention_registry.uninstall`."""
    attention_registry.uninstall(model)
    recurrent_registry.uninstall(model)
    indexers.uninstall(model)
    LayerCall.uninstall(model)
