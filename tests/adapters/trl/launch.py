"""Training in subprocesses: the scripts of `scripts/`, started as a user would, and what they leave behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.adapters.trl.support import NOT_COMPARED, TRAINING, Run, prompts, save_model

SCRIPTS = Path(__file__).parent / "scripts"
# SGD, which does not amplify rounding as Adam does.
OPTIONS: dict[str, Any] = TRAINING | {"optim": "sgd", "learning_rate": 0.5}


@dataclass(frozen=True)
class Site:
    """A user's folder with a model and data, and an environment that reaches no hub and no other user's settings."""

    folder: Path
    path: tuple[Path, ...] = ()

    @classmethod
    def build(cls, folder: Path) -> Site:
        save_model(folder / "model")
        prompts().to_json(folder / "data" / "train.jsonl")
        return cls(folder)

    def run(self, *command: object) -> subprocess.CompletedProcess[str]:
        """Run a command of this virtual environment (`python`, `torchrun`, `trl`, ...) in the user's folder."""
        process = self.start(*command)
        out, err = process.communicate()
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def start(self, *command: object, **variables: str) -> subprocess.Popen[str]:
        """The same, without waiting for its end. variables: more of its environment."""
        program, *arguments = map(str, command)
        environment = os.environ | {
            "HF_HOME": str(self.folder / "huggingface"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(map(str, self.path)),
        }
        return subprocess.Popen(
            [Path(sys.executable).with_name(program), *arguments],
            cwd=self.folder,
            env=environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def train(self, name: str, *command: object) -> Result:
        """Run a command that ends with the options of a script; its result is called `name`."""
        done = self.run(*command, "--result", self.result(name))
        assert done.returncode == 0, done.stderr[-4000:]
        return Result.read(self.result(name), done)

    def result(self, name: str) -> Path:
        return self.folder / f"{name}.pt"

    def data_options(self) -> list[str]:
        """For both scripts: what to train, on what."""
        return ["--model", str(self.folder / "model"), "--data", str(self.folder / "data" / "train.jsonl")]

    def options(self) -> list[str]:
        """For `train.py`: the whole command line but the result."""
        training = OPTIONS | {"output_dir": self.folder / "output"}
        return self.data_options() + [text for name, value in training.items() for text in (f"--{name}", str(value))]

    def yaml(self, name: str, *lines: str, **entries: Any) -> Path:
        """A recipe of OPTIONS and these entries, with these lines at its end."""
        path = self.folder / f"{name}.yaml"
        training = OPTIONS | {"output_dir": str(self.folder / name)} | entries
        path.write_text("\n".join([*(f"{key}: {json.dumps(value)}" for key, value in training.items()), *lines, ""]))
        return path


@dataclass(frozen=True)
class Result:
    """What `scripts/train.py` saved, and what it printed."""

    run: Run
    code: Path
    modules: list[str]
    arguments: list[str]
    output: str

    @classmethod
    def read(cls, path: Path, done: subprocess.CompletedProcess[str], rank: int = 0) -> Result:
        saved = torch.load(f"{path}.{rank}", weights_only=False)
        weights = {name: weight.detach() for name, weight in saved["weights"].items()}
        run = as_run(saved["logs"], saved["start"], weights)
        return cls(run, Path(saved["code"]), saved["modules"], saved["arguments"], done.stdout + done.stderr)


def install(release: str, folder: Path, *others: str) -> Path:
    """Install a TRL release and these others, and nothing else, into a folder of its own; where pip cannot, skip."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--target", str(folder)]
    done = subprocess.run([*pip, f"trl=={release}", *others], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip could not install trl=={release}: {done.stderr.strip().splitlines()[-1:]}")
    return folder


def as_run(logs: list[dict[str, float]], start: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> Run:
    """Logs of a trainer and its weights, in the form that `support` compares."""
    steps = [entry for entry in logs if "loss" in entry]
    metrics = [{k: v for k, v in entry.items() if not any(part in k for part in NOT_COMPARED)} for entry in steps]
    return Run(metrics, start, weights, [{k: v for k, v in entry.items() if k.startswith("dta/")} for entry in steps])
