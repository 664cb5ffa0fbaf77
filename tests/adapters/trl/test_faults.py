"""Faults in real trainings: steps that overflow, signals, ranks without memory. What goes on ends as it would have."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3Config
from trl import GRPOConfig, GRPOTrainer

from dta_plugin.adapters.trl import TreeGRPOConfig, TreeGRPOTrainer
from tests.adapters.trl.launch import SCRIPTS, Site
from tests.adapters.trl.support import GEOMETRY, TOLERANCE, Run, moved, save_model, train, weight_difference

Layer = torch.nn.Module
OVERFLOWS: dict[str, Callable[[torch.Tensor], torch.Tensor | None]] = {
    "forward": lambda output: output * float("inf"),
    "backward": lambda output: output.register_hook(lambda gradient: gradient * float("inf")) and None,
    "never": lambda output: None,
}


def with_scaler(place: str, scalers: list[torch.amp.GradScaler]) -> Callable[[Any], None]:
    """Prepares a trainer: a loss scaler as with fp16, and in its second step an overflow in the first layer."""

    def prepare(trainer: Any) -> None:
        scalers.append(torch.amp.GradScaler("cpu", init_scale=1024.0))
        trainer.accelerator.scaler = scalers[-1]

        def overflow(_: Layer, __: Any, output: torch.Tensor) -> torch.Tensor | None:
            if trainer.state.global_step == 1 and torch.is_grad_enabled():
                return OVERFLOWS[place](output)
            return None

        trainer.model.model.layers[0].register_forward_hook(overflow)

    return prepare


@pytest.mark.parametrize("place", ["forward", "backward"])
def test_a_scaler_skips_the_step_that_overflows(model: str, tmp_path: Path, place: str) -> None:
    """accelerate has no fp16 on a CPU; its own optimizer steps, and skips, by the scaler that its trainer is given."""
    scalers: list[torch.amp.GradScaler] = []

    def run(trainer: type, config: type, place: str = place) -> Run:
        return train(model, tmp_path, trainer, config, with_scaler(place, scalers), max_grad_norm=0.0)

    stock, tree = run(GRPOTrainer, GRPOConfig), run(TreeGRPOTrainer, TreeGRPOConfig)
    assert [scaler.get_scale() for scaler in scalers] == [512.0, 512.0]
    assert len(tree.metrics) == 3 and all(entry["dta/dense_fallback"] == 0 for entry in tree.dta)
    assert all(weight.isfinite().all() for weight in tree.weights.values())
    assert weight_difference(stock, tree) <= TOLERANCE and moved(stock) > 1000 * TOLERANCE
    assert weight_difference(stock, run(GRPOTrainer, GRPOConfig, "never")) > 100 * TOLERANCE, "nothing was skipped"


def test_tied_ranks_without_memory_are_told_what_to_set(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dta_plugin.execution.auto.is_collective", lambda _: True)

    def no_memory(_: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def prepare(trainer: Any) -> None:
        def hook(_: Layer, __: Any, output: torch.Tensor) -> None:
            if output.requires_grad:
                output.register_hook(no_memory)

        trainer.model.model.layers[0].register_forward_hook(hook)

    with pytest.raises(torch.OutOfMemoryError, match=r"set max_tree_tokens_per_chunk below \d+, or executor='stream"):
        train(model, tmp_path, TreeGRPOTrainer, TreeGRPOConfig, prepare, dta_probe="off")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site.build(tmp_path_factory.mktemp("site"))


def command(site: Site, name: str, *options: object) -> list[object]:
    """The command line of a training of four steps, of two micro-batches each, with a checkpoint after each."""
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4, "gradient_accumulation_steps": 2}
    recipe = site.yaml(name, "use_dta: true", "dta_verify: first", **saving)
    script = ("-m", "dta_plugin.run", SCRIPTS / "train_disturbed.py")
    return ["python", *script, "--config", recipe, *site.data_options(), "--result", site.result(name), *options]


@pytest.fixture(scope="module")
def undisturbed(site: Site) -> dict[str, torch.Tensor]:
    done = site.run(*command(site, "undisturbed"))
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(site.result("undisturbed"))


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_a_signal_within_a_step(site: Site, undisturbed: dict[str, torch.Tensor], number: signal.Signals) -> None:
    """It ends there and then, leaves no temporary files (after SIGTERM), and goes on from its checkpoint as if not."""
    name, temporary = number.name, site.folder / f"tmp-{number.name}"
    temporary.mkdir()
    process = site.start(*command(site, name, "--pause", site.folder / f"{name}.pause"), TMPDIR=str(temporary))
    while not (site.folder / f"{name}.pause").exists():
        assert process.poll() is None, process.communicate()[1][-4000:]
        time.sleep(0.1)
    assert list(temporary.glob("dta_plugin_*/*/*.yaml")), "the copy of the recipe"
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == -number and not site.result(name).exists()
    if number == signal.SIGTERM:
        assert not list(temporary.rglob("*"))
    checkpoint = site.folder / name / "checkpoint-2"
    done = site.run(*command(site, name, "--resume_from_checkpoint", checkpoint))
    assert done.returncode == 0, done.stderr[-4000:]
    resumed = torch.load(site.result(name))
    assert "verified against dense" in done.stdout + done.stderr, "no tree ran"
    for key, weight in load_file(checkpoint / "model.safetensors").items():
        torch.testing.assert_close(resumed[key], undisturbed[key], rtol=0, atol=1e-6)
        assert (weight - resumed[key]).abs().max() > 1e-4, "there was nothing left to do"


@pytest.mark.long
def test_within_600_megabytes(site: Site) -> None:
    """Stock TRL runs out of memory where a tree trains chunk by chunk, to the weights of a run that has enough."""
    wide = Qwen3Config(**GEOMETRY | {"hidden_size": 256, "intermediate_size": 2048, "num_hidden_layers": 3})
    wide_model = save_model(site.folder / "wide", config=wide)
    rows = {"per_device_train_batch_size": 96, "num_generations": 12, "max_completion_length": 64, "max_steps": 2}

    def trained(name: str, flag: str, *options: object) -> tuple[int, str]:
        recipe = site.yaml(name, f"use_dta: {flag}", **rows)
        script = ("-m", "dta_plugin.run", SCRIPTS / "train_disturbed.py")
        data = ("--data", site.folder / "data" / "train.jsonl", "--result", site.result(name))
        done = site.run("python", *script, "--config", recipe, "--model", wide_model, *data, *options)
        return done.returncode, done.stdout + done.stderr

    little = ("--megabytes", 600)
    (free, _), (tree, printed), (stock, error) = (
        trained("free", "true"),
        trained("tree", "true", *little),
        trained("stock", "false", *little),
    )
    assert (free, tree) == (0, 0), printed[-4000:]
    assert "streamed on cpu in" in printed
    assert stock != 0 and "can't allocate memory" in error
    expected, found = torch.load(site.result("free")), torch.load(site.result("tree"))
    for key, weight in expected.items():
        torch.testing.assert_close(found[key], weight, rtol=0, atol=1e-5)
