"""The command for machines with a GPU: its plans fit their time, and no step stops the next. Nothing here needs one."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as run
from benchmarks.gpu import plan
from benchmarks.gpu.tests import FILES

ROOT = Path(__file__).resolve().parents[2]
TEN_MINUTES = 600
STARTING = 5  # seconds beyond a step's limit: until it is ended, and what the driver itself takes


@pytest.mark.parametrize("name", ["op", "trl", "more"])
@pytest.mark.parametrize("recorded", [Path("recorded.jsonl.gz"), None])
def test_plans_fit_ten_minutes(name: str, recorded: Path | None) -> None:
    steps = plan.PLANS[name](plan.Setting(False, Path("site"), Path("wheels"), recorded))
    assert sum(step.seconds + STARTING for step in steps) <= TEN_MINUTES
    assert len({step.name for step in steps}) == len(steps)
    given = [str(recorded) in step.command for step in steps]
    assert any(given) == (recorded is not None)


def test_trainers_are_needed_in_one_plan_only() -> None:
    setting = plan.Setting(False, Path("site"), Path("wheels"), None)
    assert not any("policy_update" in part for step in plan.op(setting) for part in step.command)


@pytest.mark.parametrize("name", ["op", "trl", "more"])
@pytest.mark.parametrize("dry", [True, False])
def test_every_command_is_understood(monkeypatch: pytest.MonkeyPatch, name: str, dry: bool) -> None:
    """Each script's own parser takes the options of its step."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: not dry)
    steps = plan.PLANS[name](plan.Setting(dry, Path("site"), Path("wheels"), Path("recorded.jsonl.gz")))
    commands = [step.command for step in steps if step.command[1].startswith("benchmarks.")]
    assert commands
    for _, name, *options in commands:
        script = importlib.import_module(name)
        script = importlib.import_module(f"{name}.__main__") if hasattr(script, "__path__") else script
        monkeypatch.setattr(sys, "argv", [name, *options])
        script._arguments()


def test_a_step_that_fails_or_hangs_does_not_stop_the_next(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    about = {"machine": {"accelerator": "none"}, "versions": {"torch": "0"}, "commit": None}
    steps = [
        plan.Step(
            "machine", 20, ["-c", f"import sys, json; json.dump({about!r}, open(sys.argv[1], 'w'))", plan.RESULT]
        ),
        plan.Step("broken", 20, ["-c", "print('so far'); raise SystemExit(3)"]),
        plan.Step(
            "hanging", 1, ["-c", "import subprocess; print('begun', flush=True); subprocess.run(['sleep', '60'])"]
        ),
        plan.Step("last", 20, ["-c", "import dta_plugin; print(dta_plugin.__file__)"]),
    ]
    monkeypatch.setitem(run.PLANS, "op", lambda _: steps)
    monkeypatch.setattr(run, "DRY_PATIENCE", 1)
    monkeypatch.setattr(sys, "argv", ["gpu", "op", "--dry", "--output", str(tmp_path), "--commit", "1a2b3c4"])
    with pytest.raises(SystemExit) as end:
        run.main()
    assert end.value.code == 1
    found = {step.name: json.loads((tmp_path / f"gpu_op_{step.name}.json").read_text()) for step in steps}
    assert {name: step["outcome"] for name, step in found.items()} == {
        "machine": "passed",
        "broken": "failed",
        "hanging": "out of time",
        "last": "passed",
    }
    assert found["broken"]["returncode"] == 3 and found["broken"]["note"] == "so far"
    assert found["hanging"]["seconds"] < 20
    assert found["last"]["note"] == str(ROOT / "dta_plugin" / "__init__.py")
    assert all(step["commit"] == "1a2b3c4" and step["machine"] == about["machine"] for step in found.values())
    table = capsys.readouterr().out.strip().splitlines()[-5:]
    assert [line.split()[0] for line in table[:4]] == [step.name for step in steps]
    assert "begun" in (tmp_path / "gpu_op.log").read_text()


def test_without_a_gpu_it_is_an_error(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "op", "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env={"CUDA_VISIBLE_DEVICES": "", "PATH": ""})
    assert done.returncode == 1 and "no CUDA device" in done.stderr and not (tmp_path / "out").exists()


def test_every_test_of_the_device_runs_there() -> None:
    """Files whose tests move to the GPU where there is one are those that say where they run."""
    imports = re.compile(r"^from tests\.support\.(interpreter|triton_checks) import", re.MULTILINE)
    on_device = {path for path in (ROOT / "tests").rglob("test_*.py") if imports.search(path.read_text())}
    listed = [ROOT / name for name in FILES]
    assert on_device and all(any(path.is_relative_to(where) for where in listed) for path in on_device)


def test_device_tests_are_collected_without_hypothesis_or_trainers() -> None:
    """A GPU machine has pytest, torch and transformers, and perhaps nothing else."""
    missing = ("hypothesis", "trl", "peft", "accelerate", "datasets", "prefix_grouper", "xdist", "matplotlib")
    code = (
        "import sys, importlib.abc\n"
        "class Absent(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {missing!r}: raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import importlib.util as util\n"
        "known = util.find_spec\n"
        f"absent = lambda name: name.split('.')[0] in {missing!r}\n"
        "util.find_spec = lambda name, package=None: None if absent(name) else known(name, package)\n"
        f"import pytest; sys.path.insert(0, {str(ROOT)!r})\n"
        "from benchmarks.gpu.tests import FILES\n"
        "sys.exit(pytest.main(['--collect-only', '-p', 'no:cacheprovider', '-m', 'not slow', *FILES]))\n"
    )
    environment = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "test_long_rows_are_exact" in done.stdout and "test_random_forests" in done.stdout
