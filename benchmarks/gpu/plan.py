"""What `make gpu` runs, in which order and for how long at most. Limits of a plan add up to less than ten minutes.

`op` needs torch, Triton, transformers and pytest. `trl` needs TRL, datasets, PEFT and PrefixGrouper besides: its first
step unpacks them from the wheels that `make gpu-wheels` downloads on another machine. `more` needs what `op` needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

RESULT = "{result}"  # stands for the JSON file that a step is to write
PROCESSES = 12
FEW = "any_strides or strided_sinks"  # all are collected, these take seconds in Triton's interpreter
# What it says counts, not its exit code: a machine for the op alone has no trainer, which is a finding.
DOCTOR = "from dta_plugin.cli import main; main(['doctor'])"
TRAINER = ("trl", "datasets", "peft", "prefix_grouper")


@dataclass(frozen=True, slots=True)
class Setting:
    """dry: no GPU. site: where wheels are unpacked. rollouts: recorded trajectories, if there are any."""

    dry: bool
    site: Path
    wheels: Path
    rollouts: Path | None


@dataclass(frozen=True, slots=True)
class Step:
    """command: Python's arguments. seconds: what it may take."""

    name: str
    seconds: int
    command: list[str]


def op(setting: Setting) -> list[Step]:
    """Is it right, how fast is each kernel with each row of the launch table, how fast is the whole op?"""
    sized = ["--device", "cpu", "--smoke"] if setting.dry else []
    recorded = _recorded(setting)
    tests = ["--seconds", "150", "--processes", str(PROCESSES)]
    if setting.dry:
        tests = ["--seconds", "1500", "--processes", "2", "--select", FEW]
    workers = [] if setting.dry else ["--workers", str(PROCESSES)]
    chosen = [] if setting.dry else ["--workloads", "target", *(["rollouts"] if recorded else []), "--seconds", "4"]
    steps = [
        _machine(setting),
        Step("doctor", 45, ["-c", DOCTOR]),
        Step("tests", 160, ["-m", "benchmarks.gpu.tests", *tests, "--output", RESULT]),
        Step("kernels", 165, ["-m", "benchmarks.kernels", *sized, *workers, "--seconds", "150", "--output", RESULT]),
        Step("attention", 150, ["-m", "benchmarks.attention", *sized, *chosen, *recorded, "--output", RESULT]),
    ]
    compile_all = Step("compile", 240, ["-m", "tests.support.offline"])
    return [*steps, compile_all] if setting.dry else steps


def trl(setting: Setting) -> list[Step]:
    """Policy updates of real model sizes, full and LoRA, with stock TRL, PrefixGrouper, FlexAttention and the tree."""
    missing = any(find_spec(name) is None for name in TRAINER)
    unpack = ["-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--upgrade"]
    unpack += ["--target", str(setting.site), *map(str, sorted(setting.wheels.glob("*.whl")))]
    return [
        _machine(setting),
        *([Step("wheels", 40, unpack)] if missing else []),
        _update(setting, "qwen3-0.6b", 120, star="16384/2048/16"),
        _update(setting, "qwen3-0.6b", 100, star="16384/2048/16", lora=True),
        _update(setting, "qwen3-4b", 155, star="4096/1024/16"),
        _update(setting, "qwen3-4b", 125, star="4096/1024/16", lora=True),
    ]


def more(setting: Setting) -> list[Step]:
    """What else has been measured on CPUs only: updates on half of the tokens, and of diffusion language models."""
    sized = ["--smoke"] if setting.dry else ["--device", "cuda"]
    recorded, written = _recorded(setting), ["--output", RESULT]
    return [
        _machine(setting),
        Step("token_selection", 270, ["-m", "benchmarks.token_selection.updates", *sized, *recorded, *written]),
        Step("diffusion_memory", 240, ["-m", "benchmarks.diffusion.memory", *sized, *written]),
    ]


PLANS: dict[str, Callable[[Setting], list[Step]]] = {"op": op, "trl": trl, "more": more}


def _machine(setting: Setting) -> Step:
    device = "cpu" if setting.dry else "cuda"
    return Step("machine", 30, ["-m", "benchmarks.gpu.machine", "--device", device, "--output", RESULT])


def _update(setting: Setting, model: str, seconds: int, star: str, lora: bool = False) -> Step:
    """One model: a star, whose dense path runs sequence by sequence, and recorded rollouts."""
    recorded = _recorded(setting)
    if setting.dry:
        where = ["--smoke"]
    else:
        where = ["--device", "cuda", "--dtype", "bfloat16", "--rows", star, *(["rollouts"] if recorded else [])]
    how = ["--model", model, "--contenders", "trl", "prefix_grouper", "flex", "tree", "--checkpointing"]
    how += ["--micro-batch", "1", "--rounds", "2", *(["--lora"] if lora else [])]
    command = ["-m", "benchmarks.policy_update", *where, *how, *recorded, "--output", RESULT]
    return Step(f"{model}_{'lora' if lora else 'full'}", seconds, command)


def _recorded(setting: Setting) -> list[str]:
    return ["--rollouts", str(setting.rollouts)] if setting.rollouts and not setting.dry else []
