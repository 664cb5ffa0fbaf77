"""The probe and `verify`: a tree that is right passes, one that is not is refused before anything is trained on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dta_plugin.adapters.verl_plugin.megatron.check import probe_data
from dta_plugin.config import TreeConfig
from dta_plugin.errors import UnsupportedError, VerificationError
from tests.adapters.megatron.faults import FAULTS
from tests.adapters.megatron.support import RECOMPUTATION, Setup, build, difference, inferred, train
from tests.adapters.verl.support import Step, mini_batch

RIGHT = {
    "float32": Setup(),
    "bfloat16": Setup(dtype="bfloat16"),
    "experts": Setup("moe", dtype="bfloat16"),
    "padded": Setup(packed=False, dtype="bfloat16"),
    "recomputed": Setup(transformer=RECOMPUTATION["full"]),
    "window": Setup(packed=False, transformer={"window_size": (6, 0)}),
}


@pytest.mark.parametrize("what", RIGHT)
def test_what_is_right_passes(what: str, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="dta_plugin"):
        step = Step(shape="turns", budget=30, stock_budget=90, config=TreeConfig(verify="every:2"))
        train(build(RIGHT[what], folder, tree=True), [step])
    assert caplog.text.count("probed: log-probs of a small tree differ by") == 1
    assert caplog.text.count("mini-batch 1 verified against verl's own path") == 1
    assert "mini-batch 2 verified" not in caplog.text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_refused(fault: str, dtype: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup(dtype=dtype)
    (stock,) = train(build(setup, folder, tree=False), [Step()])
    FAULTS[fault](monkeypatch)
    with pytest.raises(UnsupportedError, match="a small tree differs from the model's own path"):
        inferred(build(setup, folder, tree=True), mini_batch(Step()))
    dense = Step(config=TreeConfig(on_unsupported="dense"))
    assert difference(train(build(setup, folder, tree=True), [dense])[0], stock) == 0
    with pytest.raises(UnsupportedError, match="a small tree differs"):  # though it would save less than is asked for
        engine: Any = build(setup, folder, tree=True)
        engine.configure(TreeConfig(min_saving=0.6))
        inferred(engine, mini_batch(Step(shape="star", budget=500)))
    engine = build(setup, folder, tree=True)
    engine.configure(TreeConfig(probe="off", verify="first"))
    with pytest.raises(VerificationError, match="differ by"):
        inferred(engine, mini_batch(Step()))


@pytest.mark.parametrize("multiple", [1, 8, 10, 32])
def test_a_probe_has_rows_for_every_virtual_stage(multiple: int, folder: Path) -> None:
    """As many micro-batches as Megatron's schedule asks for, none of them empty."""
    engine: Any = build(Setup(), folder, tree=True)
    assert len(probe_data(engine.tf_config, 64, torch.device("cpu"), multiple)) >= multiple
