"""DeepSpeed on two ranks: ZeRO-1 and ZeRO-2 as stock, ZeRO-3 packed or a clear error. Skipped without deepspeed.

pip install wheel ninja hjson py-cpuinfo msgpack einops && DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.ranks import on_two_ranks

pytest.importorskip("deepspeed")
SCRIPT = "tests.execution.deepspeed_script"


@pytest.mark.parametrize("stage", [1, 2])
def test_equal_to_stock(tmp_path: Path, stage: int) -> None:
    """ "mixed": one rank streams, the other runs packed; ZeRO-2 needs their gradients in one order."""
    for weights in on_two_ranks(SCRIPT, tmp_path, str(stage)):
        for (name, accumulate), found in weights.items():
            for key, expected in weights["stock", accumulate].items():
                difference = float((found[key] - expected).abs().max())
                assert difference < 1e-6, (name, accumulate, key, difference)


def test_zero3_names_fsdp2(tmp_path: Path) -> None:
    for found in on_two_ranks(SCRIPT, tmp_path, "3"):
        assert found["auto"] == "packed"
        assert "DeepSpeed ZeRO-3 shards; FSDP2, or ZeRO-1 or 2, can stream" in found["streamed"]
        assert (
            "max_tree_tokens_per_chunk=4 is not kept: a model that DeepSpeed ZeRO-3 shards; FSDP2"
            in found["above the budget"]
        )
