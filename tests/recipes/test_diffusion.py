"""The diffusion recipes: parsed as their script parses them, and run for a few steps on the quickstart's tiny model."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from trl import ModelConfig, TrlParser

from dta_plugin.adapters.trl import DiffusionGRPOConfig
from tests.recipes.test_trl import DIFFUSION, Trained
from tests.support import recipes as support

SCRIPT = support.RECIPES / "trl" / "diffusion.py"


@pytest.fixture(autouse=True)
def path_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """A script finds its neighbours in its own folder."""
    monkeypatch.setattr(sys, "path", [str(SCRIPT.parent), *sys.path])


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What recipes/quickstart/diffusion.py writes, after less pretraining."""
    folder = tmp_path_factory.mktemp("built")
    script = support.RECIPES / "quickstart" / "diffusion.py"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(script), "--output", str(folder), "--steps", "60", "--prompts", "32"])
        runpy.run_path(str(script), run_name="__main__")
    return folder


@pytest.mark.parametrize("recipe", DIFFUSION)
def test_yaml(recipe: str, tmp_path: Path) -> None:
    arguments = runpy.run_path(str(SCRIPT))["DiffusionArguments"]
    here = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false"]
    script, training, model = TrlParser((arguments, DiffusionGRPOConfig, ModelConfig)).parse_args_and_config(
        ["--config", str(SCRIPT.with_name(f"{recipe}.yaml")), *here]
    )
    task = "sums" if recipe.startswith("quickstart") else recipe.split("_")[2]
    assert script.task == task
    assert training.objective == "trajectory"
    each = training.accelerator_config.gradient_accumulation_kwargs or {}
    assert each == ({"sync_each_batch": True} if recipe.endswith("fsdp2") else {})
    at_zero = recipe not in ("llada_8b_gsm8k", "quickstart_diffusion")
    assert (training.eval_sampler_config(None).temperature == 0.0) == at_zero
    assert not model.use_peft or model.lora_dropout == 0.0


@pytest.mark.parametrize("recipe", DIFFUSION)
def test_trains(
    recipe: str, built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The quickstart as it is; LLaDA's recipes with the tiny model and its task, everything else their own."""
    small = {
        "model_name_or_path": built / "model",
        "dataset_name": built / "data",
        "task": "sums",
        "output_dir": tmp_path,
        "max_steps": 2,
        "warmup_steps": 0,
        "use_cpu": True,
        "bf16": False,
        "dtype": "float32",
        "max_completion_length": 4,
        "block_length": 2,
        "diffusion_steps": 4,
        "gradient_accumulation_steps": 1,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    flags = [text for name, value in small.items() for text in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--config", str(SCRIPT.with_name(f"{recipe}.yaml")), *flags])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    trained = Trained.read(tmp_path, capsys.readouterr().out)
    assert len(trained.steps) == 2
    assert all(step["grad_norm"] > 0 and step["diffusion/log_prob"] < 0 for step in trained.steps)
    start = load_file(built / "model" / "model.safetensors")
    assert all("lora" in name or not (start[name] == w).all() for name, w in trained.weights.items() if "proj" in name)
