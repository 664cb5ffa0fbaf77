"""verl's SFT trainer: options from its command, the same losses as stock, and `dta/*` in its logger."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("verl.trainer.sft_trainer", reason="verl is not installed; it needs an environment of its own")

REPOSITORY = Path(__file__).parents[3]
SETTINGS = [
    "+model.load_tokenizer=False",
    "+model.override_config.attn_implementation=sdpa",
    "engine.use_torch_compile=False",
    "engine.strategy=fsdp2",
    "engine.model_dtype=fp32",
    "+engine.mixed_precision={param_dtype: fp32, reduce_dtype: fp32, buffer_dtype: fp32}",
    "optim.lr=1e-3",
    "data.max_token_len_per_gpu=1000",
    "trainer.total_epochs=1",
    "trainer.logger=[file]",
    "trainer.device=cpu",
    "hydra.output_subdir=null",
    "hydra.run.dir=.",
]
ONE_RANK = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
DRAWN = "+dta.picture=pictures/tree.svg"
PLUGIN = "model.external_lib=dta_plugin.adapters.verl"


def run(folder: Path, model: Path, *overrides: str) -> tuple[subprocess.CompletedProcess[str], list[dict[str, Any]]]:
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "tests.adapters.verl.sft_script", f"model.path={model}", *SETTINGS, *overrides],
        cwd=folder,
        env=os.environ
        | {
            "PYTHONPATH": str(REPOSITORY),
            **ONE_RANK,
            "STORE": str(folder / "store"),
            "VERL_FILE_LOGGER_PATH": str(folder / "metrics.jsonl"),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    logged = folder / "metrics.jsonl"
    lines = logged.read_text().splitlines() if logged.exists() else []
    return done, [json.loads(line)["data"] for line in lines]


def test_options_and_metrics(folder: Path, tmp_path: Path) -> None:
    stock, expected = run(tmp_path / "stock", folder)
    assert stock.returncode == 0, stock.stderr[-3000:]
    done, found = run(tmp_path / "tree", folder, PLUGIN, "+dta.executor=packed", "+dta.verify=first", DRAWN)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(found) == len(expected) == 3
    for ours, theirs in zip(found, expected, strict=True):
        for name in ("train/loss", "train/grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5)
        assert ours["dta/compression_ratio"] > 1.5 and ours["dta/dense_fallback"] == 0
        assert not [name for name in theirs if name.startswith("dta/")]
    said, file = done.stderr + done.stdout, tmp_path / "tree" / "pictures" / "tree.svg"
    assert "verified against dense" in said and f"the first tree is drawn in {file}" in said  # what options asked for
    assert "first tree: " in file.read_text()


def test_wrong_options_come_before_the_model(folder: Path, tmp_path: Path) -> None:
    done, _ = run(tmp_path / "wrong", folder, PLUGIN, "+dta.exeutor=packed")
    assert done.returncode != 0 and "In dta: Unknown option(s) exeutor" in done.stderr
    assert "contains" not in done.stdout  # what verl prints of a model: its parameters


@pytest.mark.slow
def test_switched_off(folder: Path, tmp_path: Path) -> None:
    done, found = run(tmp_path / "off", folder, PLUGIN, "+dta.use_dta=false")
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(found) == 3 and not [name for name in found[0] if name.startswith("dta/")]
