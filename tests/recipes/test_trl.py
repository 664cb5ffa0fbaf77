"""Every recipe is parsed as its script parses it; the TRL scripts train two steps on CPUs, with the flag and without.

The models are tiny but not random: they were taught to half-solve the task, so rewards differ within a group and tool
calls happen (see tests/support/recipes.py). Only what a CPU and this size need is overridden; all else is the recipe's.
"""

from __future__ import annotations

import ast
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file
from trl import GRPOConfig, ModelConfig, TrlParser
from trl.scripts.grpo import make_parser

import dta_plugin
from dta_plugin.config import TreeConfig
from dta_plugin.run import main, parse_options, take_yaml_options
from tests.support import image_recipes as images
from tests.support import recipes as support

TRL = support.RECIPES / "trl"
DIFFUSION = (
    "llada_8b_countdown",
    "llada_8b_gsm8k",
    "llada_8b_gsm8k_ddp",
    "llada_8b_gsm8k_fsdp2",
    "llada_8b_sudoku",
    "quickstart_diffusion",
)
YAMLS = sorted(path for path in TRL.glob("*.yaml") if path.stem not in DIFFUSION)
HYBRID = "qwen3_5_9b_gsm8k"
# Scripts by name: their own arguments, and where the data of those that read some is.
ARGUMENTS = {"gsm8k": "GSM8KArguments", "tools": "ToolArguments", "geometry3k": "Geometry3KArguments"}
DATA = {"gsm8k": "data", "geometry3k": "figures"}
# Of an epsilon that keeps a norm from amplifying rounding, by which another token would be sampled in the second step.
DELTA_RULE: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 32,
    "rms_norm_eps": 1e-2,
}
OFFLINE = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(support.RECIPES.parent)}
SMALL = {
    "use_cpu": True,
    "bf16": False,
    "dtype": "float32",
    "use_vllm": False,
    "per_device_train_batch_size": 8,
    "num_generations": 8,
    "gradient_accumulation_steps": 1,
    "max_completion_length": 64,
    "max_steps": 2,
    "warmup_steps": 0,
    "learning_rate": 0.1,
    "optim": "sgd",
    "save_strategy": "no",
    "disable_tqdm": True,
}


@dataclass(frozen=True)
class Trained:
    """Log entries of a run's steps, the plugin's lines, and the weights it saved."""

    steps: list[dict[str, float]]
    said: str
    weights: dict[str, torch.Tensor] = field(repr=False)

    @classmethod
    def read(cls, output: Path, text: str) -> Trained:
        entries = [ast.literal_eval(line) for line in text.splitlines() if line.startswith("{'loss'")]
        steps = [{name: float(value) for name, value in entry.items() if value is not None} for entry in entries]
        said = "\n".join(line for line in text.splitlines() if "dta: " in line)
        (weights,) = output.glob("*model.safetensors")
        return cls(steps, said, load_file(weights))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models for all tasks, and data."""
    path = tmp_path_factory.mktemp("recipes")
    support.save_model(path / "gsm8k", support.gsm8k_examples())
    support.save_model(path / "tools", support.tool_examples())
    support.write_gsm8k(path / "data" / "train.jsonl")
    images.save_model(path / "geometry3k")
    images.write_geometry3k(path / "figures" / "train.parquet")
    return path


@pytest.fixture(autouse=True)
def process_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Scripts run in this process: what the launcher changed is restored after each test."""
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    dta_plugin.disable()


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_yaml(path: Path, tmp_path: Path) -> None:
    """Every key is known to the script it is for, or to the plugin; sharing is possible, and comparable."""
    keys = list(yaml.safe_load(path.read_text()))
    options, (_, _, readable) = take_yaml_options(["script.py", "--config", str(path)])
    here = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false"]
    _, training, model, *_, unknown = parser_of(path.stem).parse_args_and_config(
        ["--config", readable, *here], return_remaining_strings=True
    )
    assert unknown in ([], ["--module", "dta_plugin.run"])
    assert training.per_device_train_batch_size % training.num_generations == 0
    assert not model.use_peft or model.lora_dropout == 0.0
    assert isinstance(parse_options(options), TreeConfig)
    assert keys[-len(options) :] == list(options), "the plugin's keys come last"
    if not path.stem.startswith("quickstart"):
        assert (training.use_vllm, training.vllm_mode) == (True, "colocate")


@pytest.mark.parametrize(("name", "fsdp"), [("ddp", None), ("fsdp2", "2")])
def test_accelerate_config(name: str, fsdp: str | None) -> None:
    environment = launcher_environment(name)
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert environment.get("FSDP_VERSION") == fsdp


@pytest.mark.parametrize(
    "recipe", ["qwen3_0.6b_gsm8k", "qwen3_4b_gsm8k_lora", "qwen3_4b_tools", "qwen3_vl_4b_geometry3k"]
)
def test_trains_as_stock_trl_does(
    recipe: str, folder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Same rollouts, same losses, same weights; with the flag, most tokens are not computed again."""
    caplog.set_level("INFO", logger="dta_plugin")
    output = folder / recipe
    main(command(recipe, folder, "--use_dta", "false", output_dir=output))
    stock = Trained.read(output, capsys.readouterr().out + caplog.text)
    main(command(recipe, folder, output_dir=output))
    tree = Trained.read(output, capsys.readouterr().out + caplog.text)
    assert stock.said == "" and "verified against dense" in tree.said and "shared" in tree.said
    assert any(step["dta/compression_ratio"] > 3 for step in tree.steps)
    for step in tree.steps:  # a group of eight often has no advantage: then it is pruned whole
        assert step["dta/flat_tokens"] + step["dta/pruned_tokens"] > 3 * step["dta/tree_tokens"]
    assert "tools" not in recipe or any(step["tools/call_frequency"] > 0.2 for step in tree.steps)
    assert_same(stock, tree)


@pytest.mark.slow
def test_a_hybrid_trains_as_stock_trl_does(
    folder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    support.save_model(folder / "hybrid", support.gsm8k_examples(), family="qwen3_5_text", **DELTA_RULE)
    test_trains_as_stock_trl_does(HYBRID, folder, capsys, caplog)


def test_trains_on_half_of_the_tokens(
    folder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """qwen3_8b_gsm8k_nat.yaml in one process: with a budget of 1 as stock TRL does, with its own on about half.

    Not pruned: TRL's metrics of all rows are compared, and groups of so few rows often have no advantage.
    """
    caplog.set_level("INFO", logger="dta_plugin")
    own = ["--dta_prune", "never"]
    flags = {"stock": ["--use_dta", "false"], "all": [*own, "--dta_token_budget", "1.0"], "half": own}
    runs = {}
    for name, more in flags.items():
        output = folder / f"nat {name}"
        main(command("qwen3_8b_gsm8k_nat", folder, *more, output_dir=output, num_generations=4))
        runs[name] = Trained.read(output, capsys.readouterr().out)
    assert_same(runs["stock"], runs["all"])
    assert [step["dta/kept_fraction"] for step in runs["all"].steps] == [1, 1]
    steps = runs["half"].steps
    assert all(0.2 < step["dta/kept_fraction"] < 0.8 and 1 < step["dta/max_weight"] <= 2.501 for step in steps)
    assert steps[0]["reward"] == pytest.approx(runs["stock"].steps[0]["reward"])
    assert steps[0]["grad_norm"] != pytest.approx(runs["stock"].steps[0]["grad_norm"], rel=1e-3)


@pytest.mark.long
def test_fsdp2(folder: Path) -> None:
    """qwen3_8b_gsm8k.yaml in two processes, under FSDP2 as accelerate reads it from fsdp2.yaml; float32, to compare.

    Stock runs and runs as a tree take place in the same two processes, one after the other.
    """
    small = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    small |= {"num_generations": 4, "max_completion_length": 12}
    chunks, window = ["--dta_max_tree_tokens_per_chunk", "40"], ["--dta_merge_window", "always"]
    window += ["--dta_prune", "never"]  # groups of so few rows often have no advantage
    as_it_is = ["--dta_merge_window", "never", "--dta_regroup", "never", "--dta_prune", "never"]
    flags = {
        "stock": ["--use_dta", "false"],
        "packed": as_it_is,
        "streamed": [*as_it_is, *chunks],
        "window": window,
        "window, streamed": [*window, *chunks],
    }
    runs = [command("qwen3_8b_gsm8k", folder, *more, output_dir=folder / name, **small) for name, more in flags.items()]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    done = subprocess.run(
        [*torchrun, "-m", support.__name__, *f"\0{support.THEN}\0".join("\0".join(run) for run in runs).split("\0")],
        env=os.environ | launcher_environment("fsdp2", "--mixed_precision", "no") | OFFLINE | {"TMPDIR": str(folder)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    assert "shared" in done.stdout + done.stderr
    printed = done.stdout.split(support.THEN)
    stock, *trees = (Trained.read(folder / name, text) for name, text in zip(flags, printed, strict=True))
    for tree in trees:
        assert_same(stock, tree)
    chunk_counts = [{step["dta/chunks"] for step in tree.steps} for tree in trees]
    assert chunk_counts[0] == chunk_counts[2] == {1}
    assert min(chunk_counts[1] | chunk_counts[3]) > 1
    tokens = [[step["dta/tree_tokens"] for step in tree.steps] for tree in trees]
    assert tokens[0] == tokens[1] and tokens[2] == tokens[3]
    assert all(window > micro_batch for window, micro_batch in zip(tokens[2], tokens[0], strict=True))


def parser_of(recipe: str) -> TrlParser:
    """The parser of the script that the recipe is for."""
    if recipe.startswith("quickstart"):
        return make_parser()
    script, name = ("tools.py", "ToolArguments") if "tools" in recipe else ("gsm8k.py", "GSM8KArguments")
    return TrlParser((support.names_of(script)[name], GRPOConfig, ModelConfig))


def command(recipe: str, folder: Path, *more: str, **overrides: object) -> list[str]:
    """The launcher's arguments for a recipe made small."""
    task = "tools" if "tools" in recipe else "gsm8k"
    own = {"stories": 1} if task == "tools" else {"dataset_name": folder / "data"}
    model = "hybrid" if recipe == HYBRID else task
    options = SMALL | own | {"model_name_or_path": folder / model, "output_dir": folder / "out"} | overrides
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return [str(TRL / f"{task}.py"), "--config", str(TRL / f"{recipe}.yaml"), *flags, *more]


def launcher_environment(config: str, *more: str) -> dict[str, str]:
    """What `accelerate launch --config_file` tells the processes of a script."""
    path = str(support.RECIPES / "accelerate" / f"{config}.yaml")
    parsed = launch_command_parser().parse_args(["--config_file", path, *more, "script.py"])
    arguments, _, _ = _validate_launch_command(parsed)
    known = prepare_multi_gpu_env(arguments)
    return {name: value for name, value in known.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


def assert_same(stock: Trained, tree: Trained) -> None:
    """Losses, gradient norms, rewards and final weights agree; both runs learned something, the second as a tree."""
    assert len(stock.steps) == len(tree.steps) == 2
    assert any(step["reward_std"] > 0 and step["grad_norm"] > 0 for step in stock.steps)
    assert not any("dta/dense_fallback" in step for step in stock.steps)
    assert all(step["dta/dense_fallback"] == 0 for step in tree.steps)
    for a, b in zip(stock.steps, tree.steps, strict=True):
        names = ["loss", "grad_norm", "reward", "reward_std", "num_tokens"]
        if "entropy" in b and not b["dta/pruned_tokens"]:  # else it is of the tokens that ran, if any did
            names.append("entropy")
        for name in names:
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-5), name
    for name, weight in stock.weights.items():
        assert (tree.weights[name] - weight).norm() <= 1e-5 * weight.norm().clamp(min=1e-3), name
