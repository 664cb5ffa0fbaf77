"""The launcher: what it takes out of a command line, what it hands on, and how it refuses. No training here; the real
ones are in `adapters/trl/test_activation.py`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import pytest

from dta_plugin.config import TreeConfig
from dta_plugin.errors import InvalidInputError
from dta_plugin.run import take_options
from dta_plugin.run_options import Given, parse_options

# Says that it was reached, before anything else could go wrong, and what it got to see.
SCRIPT = """
import json, sys
from pathlib import Path
Path("reached").touch()
import neighbour
print(json.dumps({"argv": sys.argv, "name": __name__, "file": __file__, "path": sys.path[0],
                  "trl": "trl" in sys.modules, "torch": "torch" in sys.modules}))
if "--config" in sys.argv:
    print(Path(sys.argv[sys.argv.index("--config") + 1]).read_text())
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "train.py").write_text(SCRIPT)
    (tmp_path / "scripts" / "neighbour.py").touch()
    return tmp_path


def launch(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dta_plugin.run", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def texts(options: Mapping[str, Given]) -> dict[str, str]:
    return {name: option.text for name, option in options.items()}


def given(options: Mapping[str, str]) -> dict[str, Given]:
    return {name: Given(text, f"--{name}") for name, text in options.items()}


@pytest.mark.parametrize(
    ("arguments", "options", "rest"),
    [
        ("train.py --use_dta true --lr 1", {"use_dta": "true"}, "train.py --lr 1"),
        ("--use_dta true train.py --lr 1", {"use_dta": "true"}, "train.py --lr 1"),
        ("train.py --lr 1 --use_dta", {"use_dta": "true"}, "train.py --lr 1"),
        ("train.py --use_dta --lr 1", {"use_dta": "true"}, "train.py --lr 1"),
        ("--use-dta=false train.py", {"use_dta": "false"}, "train.py"),
        ("train.py --use_dta=maybe", {"use_dta": "maybe"}, "train.py"),
        ("train.py --use_dta maybe", {"use_dta": "maybe"}, "train.py"),
        ("--dta-min-saving 0.1 train.py", {"dta_min_saving": "0.1"}, "train.py"),
        ("train.py --dta_verify=every:2 --use_dta_x 1", {"dta_verify": "every:2"}, "train.py --use_dta_x 1"),
        ("train.py use_dta dta_verify -dta", {}, "train.py use_dta dta_verify -dta"),
    ],
)
def test_takes_its_options_out(arguments: str, options: dict[str, str], rest: str) -> None:
    given, left = take_options(arguments.split())
    assert (texts(given), left) == (options, rest.split())
    assert all(option.where == f"--{name}" for name, option in given.items())


def test_bare_flag_before_the_script(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    given, rest = take_options(["--use_dta", "scripts/train.py"])
    assert texts(given) == {"use_dta": "true"} and rest == ["scripts/train.py"]


@pytest.mark.parametrize("arguments", ["train.py --dta_verify", "train.py --dta_verify --use_dta true"])
def test_an_option_needs_a_value(arguments: str) -> None:
    with pytest.raises(InvalidInputError, match="--dta_verify has no value"):
        take_options(arguments.split())


def test_parses_every_kind_of_option() -> None:
    options = {
        "use_dta": "Yes",
        "dta_min_saving": "0.25",
        "dta_max_tree_tokens_per_chunk": "4096",
        "dta_verify": "first",
        "dta_picture": "tree.svg",
    }
    assert parse_options(given(options)) == TreeConfig(
        min_saving=0.25, max_tree_tokens_per_chunk=4096, verify="first", picture="tree.svg"
    )
    nothing = {"use_dta": "1", "dta_max_tree_tokens_per_chunk": "None", "dta_picture": "none"}
    assert parse_options(given(nothing)) == TreeConfig()
    assert parse_options({}) is None
    assert parse_options(given({"use_dta": "false", "dta_verify": "first"})) is None


WRONG = {
    "--use_dta maybe": "--use_dta='maybe'. Expected true or false",
    "--use_dta true --dta_verfy first": "--dta_verfy is no option. Did you mean --dta_verify? Expected among: --dta_b",
    "--use_dta false --dta_verfy first": "--dta_verfy is no option",
    "--use_dta true --dta-min-savings 1": "--dta_min_savings is no option. Did you mean --dta_min_saving? Expected",
    "--use_dta true --dta_xyz 1": "--dta_xyz is no option. Expected among: ",
    "--use_dta true --dta_verify often": "--dta_verify='often'. Expected 'off', 'first' or 'every:N'",
    "--use_dta false --dta_verify often": "--dta_verify='often'",
    "--use_dta true --dta_min_saving some": "--dta_min_saving='some'. Expected a value of type float",
    "--use_dta true --dta_min_saving 2": "--dta_min_saving=2.0. Expected a share",
    "--use_dta true --dta_max_tree_tokens_per_chunk 4096.5": "--dta_max_tree_tokens_per_chunk='4096.5'. Expected a val",
    "--use_dta true --dta_token_budget 0.5": "--dta_token_budget=0.5 does nothing with token_selection='all'",
    "--use_dta true --dta_picture tree.png": "--dta_picture='tree.png'. Expected a file that ends in .svg",
    "--dta_verify first": "Got --dta_verify without --use_dta. Expected --use_dta true",
    "--use_dta true --dta_verify": "--dta_verify has no value",
}


@pytest.mark.parametrize("arguments", WRONG)
def test_refuses_before_the_script_runs(folder: Path, arguments: str) -> None:
    assert_refused(folder, launch(folder, "scripts/train.py", *arguments.split()), WRONG[arguments])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "Got no script to run. Expected: python -m dta_plugin.run train.py --use_dta true"),
        (["--use_dta", "true"], "Got no script to run"),
        (["--use_dta", "true", "scripts/tarin.py"], "There is no script 'scripts/tarin.py'. Expected:"),
        (["--lr", "1", "scripts/train.py"], "Got --lr, which is no option of the plugin's, and no script"),
    ],
)
def test_refuses_without_a_script(folder: Path, arguments: list[str], complaint: str) -> None:
    assert_refused(folder, launch(folder, *arguments), complaint)


@pytest.mark.parametrize("typo", ["--use_dat", "--use-dtaa", "-use_dta", "--usedta=true", "--use_tda", "--USE_DTA"])
def test_a_slip_of_the_flag_is_pointed_out(typo: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert take_options(["train.py", typo, "true"]) == ({}, ["train.py", typo, "true"])
    written = typo.partition("=")[0]
    assert capsys.readouterr().err == f"dta_plugin.run: {written} is left to the script. Did you mean --use_dta?\n"


@pytest.mark.parametrize("other", ["--use_data", "--use_delta", "--use_dtype", "--use_dpo", "--use_dta_x", "use_dat"])
def test_names_of_the_script_are_not(other: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert take_options(["train.py", other, "true"]) == ({}, ["train.py", other, "true"])
    assert capsys.readouterr().err == ""


def test_refuses_without_trl(folder: Path) -> None:
    isolated = "import importlib.util as u, sys; u.find_spec = lambda name: None; from dta_plugin.run import main; "
    command = [sys.executable, "-c", isolated + "main(['scripts/train.py', '--use_dta'])"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert_refused(folder, done, "TRL is not installed. Expected it beside dta-plugin: pip install")


def assert_refused(folder: Path, done: subprocess.CompletedProcess[str], complaint: str) -> None:
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith(f"dta_plugin.run: {complaint}"), done.stderr
    assert done.stderr.count("\n") == 1, "one line"
    assert not (folder / "reached").exists()


def test_the_script_runs_as_it_would_alone(folder: Path) -> None:
    script = str(folder / "scripts" / "train.py")
    alone = subprocess.run([sys.executable, script, "--lr", "1"], cwd=folder, capture_output=True, text=True)
    relative = "scripts/train.py"
    for arguments in ([relative, "--lr", "1"], ["--use_dta", "false", relative, "--lr", "1", "--dta_verify=first"]):
        done = launch(folder, *arguments)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == json.loads(alone.stdout)
    seen = json.loads(alone.stdout)
    assert seen["argv"] == [script, "--lr", "1"] and seen["name"] == "__main__" and not (seen["trl"] or seen["torch"])


def test_the_script_answers_for_its_own_failures(folder: Path) -> None:
    (folder / "scripts" / "train.py").write_text("raise ValueError('mine')")
    done = launch(folder, "scripts/train.py")
    assert done.returncode == 1 and done.stderr.startswith("Traceback") and "ValueError: mine" in done.stderr
    (folder / "scripts" / "train.py").write_text("raise SystemExit(7)")
    assert launch(folder, "scripts/train.py").returncode == 7


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_teaches(folder: Path, flag: str) -> None:
    done = launch(folder, flag)
    assert done.returncode == 0 and not done.stderr
    for command in ("python -m dta_plugin.run", "accelerate launch -m", "torchrun --nproc_per_node 2 -m", "trl grpo"):
        assert command in done.stdout
    words = " ".join(done.stdout.split())
    for option in fields(TreeConfig):
        assert f"--dta_{option.name} (default {option.default})" in words and option.metadata["help"] in words


def test_the_script_has_its_own_help(folder: Path) -> None:
    assert json.loads(launch(folder, "scripts/train.py", "--help").stdout)["argv"][1:] == ["--help"]
