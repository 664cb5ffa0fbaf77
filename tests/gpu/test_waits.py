"""On a CUDA device: the waits that CUDA itself reports, one per batch. tests/execution/test_waits.py says where."""

from __future__ import annotations

import warnings

import pytest
import torch

import dta_plugin
from dta_plugin import TreeConfig
from tests.support.models import tiny_model
from tests.support.trees import star

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def waits(model: torch.nn.Module, config: TreeConfig, reads_itself: bool = False) -> list[str]:
    """What CUDA says of one batch, forward and backward."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            out = dta_plugin.sequence_logprobs(model, star(4, prefix=20, branch=6), config)
            loss = torch.cat(out.logprobs).sum()
            if reads_itself:
                loss.item()
            loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [f"{w.filename}:{w.lineno}" for w in found if "synchronizing CUDA operation" in str(w.message)]


@pytest.mark.parametrize("layers", [2, 4])
@pytest.mark.parametrize("executor", ["packed", "streamed"])
def test_one_wait_per_batch(executor: str, layers: int) -> None:
    model = tiny_model("qwen3", head_dim=64, num_hidden_layers=layers, layer_types=None).to("cuda")
    config = TreeConfig(executor=executor, max_tree_tokens_per_chunk=16 if executor == "streamed" else None)
    waits(model, config)  # compiles, and runs the self-check
    found = waits(model, config)
    assert len(found) <= 1, found
    assert len(waits(model, config, reads_itself=True)) == len(found) + 1  # negative control
