"""The rehearsal: two short rows through a model that shares prefixes, before anything depends on it.

Where the probe is off, or cannot run (weights that FSDP or ZeRO-3 shards), a layer that goes around the tree, or a
backend that does not run here, would raise in the middle of a training's step. Rehearsed on all ranks at once, it keeps
the model on its own path from the start, on all ranks alike.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from dta_plugin.errors import UnsupportedError
from dta_plugin.execution.probing.forest import probe_forest
from dta_plugin.execution.probing.probe import undisturbed
from dta_plugin.execution.ranks import gathered, is_fsdp, is_zero3
from dta_plugin.models.introspection import causal_lm, decoder_of, input_device
from dta_plugin.sharing.decoder_hooks import PrefixSharing
from dta_plugin.tree.totals import Totals

_TOKENS = 8  # of a row


def rehearse(model: nn.Module, sharing: PrefixSharing) -> str | None:
    """Why the model, wrapped as it is called, cannot run as a tree, or None; if it cannot, it shares no more.

    All ranks that train it must call this together. Nothing is counted.
    """
    before = dict(vars(sharing))
    sharing.config = replace(sharing.config, min_saving=0.0, probe="off", on_unsupported="error")
    sharing.padding_reader, sharing.reads_caches, sharing.is_paused, sharing.totals = None, False, False, Totals()
    found = None
    try:
        _run(model)
    except UnsupportedError as error:
        found = error.reason
    except Exception as error:  # wrong options, and models that need more than ids and a mask
        found = f"two short rows cannot be tried ({type(error).__name__}: {error})"
    finally:
        vars(sharing).update(before)
    obstacle = next((each for each in gathered(model, found) if each is not None), None)
    if obstacle is not None:
        sharing.remove()
        sharing.reason = obstacle
    return obstacle


def _run(model: nn.Module) -> None:
    base = causal_lm(model)
    device = input_device(base)
    tokens = probe_forest(base).sequences[0]
    rows = torch.tensor([tokens[:_TOKENS], [*tokens[: _TOKENS - 1], tokens[_TOKENS]]], device=device)
    # Weights that are sharded are whole in calls of the whole model; else its decoder, whatever the head asks for.
    called = model if is_fsdp(model) or is_zero3(model) else decoder_of(base)
    with undisturbed(model, base, device):
        called(input_ids=rows, attention_mask=torch.ones_like(rows))
