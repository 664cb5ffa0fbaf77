"""The launcher and the YAML of a script: what counts as an entry of the plugin, and what the script gets to read."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dta_plugin.config import TreeConfig
from dta_plugin.errors import InvalidInputError
from dta_plugin.run_options import parse_options
from dta_plugin.run_yaml import take_yaml_options

# Says where its config is and what is in it, then ends as its first argument tells.
SCRIPT = """
import os, signal, sys, time
path = sys.argv[sys.argv.index("--config") + 1]
print(path, flush=True)
print(open(path).read(), flush=True)
match sys.argv[1]:
    case "raise": raise ValueError("mine")
    case "exit": sys.exit(3)
    case "fork":
        reader, writer = os.pipe()
        if (child := os.fork()) == 0:
            os.write(writer, b"!")
            time.sleep(60)
            os._exit(0)
        os.read(reader, 1)
        os.kill(child, signal.SIGTERM)
        assert os.waitpid(child, 0)[1] == signal.SIGTERM and os.path.exists(path)
    case "handle":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
        print("ready", flush=True)
        time.sleep(60)
    case "wait": time.sleep(60)
"""


def take(path: Path, text: str | bytes, name: str = "recipe.yaml") -> tuple[dict[str, str], bytes]:
    """(options, what the script reads) of a file with this content."""
    (path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    options, (_, copy) = take_yaml_options(["--config", str(path / name)])
    return {key: option.text for key, option in options.items()}, Path(copy).read_bytes()


def launch(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    (folder / "train.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "dta_plugin.run", "train.py", *arguments]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("form", ["--config FILE", "--config=FILE"])
@pytest.mark.parametrize("name", ["a recipe.yaml", "recipe.yml", "recipe.conf", "recipe"])
def test_takes_its_entries_out(tmp_path: Path, form: str, name: str) -> None:
    recipe = tmp_path / name
    kept = "# my recipe\nlearning_rate: 1e-6\n\n\nnested:\n  dta_verify: mine\n  use_dta: mine\n"
    recipe.write_text(f"use_dta: true\n{kept}dta_verify: 'every:2'  # often\ndta_max_tree_tokens_per_chunk: null")
    arguments = ["train.py", *(part.replace("FILE", str(recipe)) for part in form.split()), "--lr", "1"]
    options, rest = take_yaml_options(arguments)
    assert [(option.text, option.where) for option in options.values()] == [
        ("True", f"{recipe}: use_dta"),
        ("every:2", f"{recipe}: dta_verify"),
        ("None", f"{recipe}: dta_max_tree_tokens_per_chunk"),
    ]
    assert rest[:2] == ["train.py", "--config"] and rest[3:] == ["--lr", "1"] and len(rest) == 5
    assert Path(rest[2]).name == name and Path(rest[2]).read_text() == kept
    assert parse_options(options) == TreeConfig(verify="every:2")


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("use_dta: yes\na: 1e-6 # x\n", "a: 1e-6 # x\n"),
        ("a: 0x10\n'use_dta': on", "a: 0x10\n"),
        ('a: 1\n"use-dta"  :   TRUE   # switch\nb: 0.10\n', "a: 1\nb: 0.10\n"),
        ("a: 1\r\nuse_dta: true\r\nb: |\r\n  x\r\n", "a: 1\r\nb: |\r\n  x\r\n"),
        ("  a: 1\n  use_dta: true\n  b: [1,\n 2]\n", "  a: 1\n  b: [1,\n 2]\n"),
        ("%YAML 1.1\n---\nuse_dta: true\na: 1\n...\n", "%YAML 1.1\n---\na: 1\n...\n"),
        ("use_dta: >-\n  true\n\n# c\na: &x {b: 1}\nc: *x\n", "# c\na: &x {b: 1}\nc: *x\n"),
        ("use_dta:\n  true\na: !mine [1]\n", "a: !mine [1]\n"),
        ("a: &on true\nuse_dta: *on\nb: 1\n", "a: &on true\nb: 1\n"),
        ("use_dta: maybe\na: 1\nuse-dta: true\n", "a: 1\n"),
        ("{use_dta: true, a: 1e-6, b: [x,  y]}\n", "{a: 1e-6, b: [x,  y]}\n"),
        ("{a: 1e-6, use_dta: true, b: 2} # c", "{a: 1e-6, b: 2} # c"),
        ('{\n  "a": 1.0,\n  "use_dta": true\n}\n', '{\n  "a": 1.0\n}\n'),
        ("{use-dta: true, 'use_dta': true, a: 1, use_dta: true, use_dta: true,}", "{a: 1,}"),
    ],
)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_the_rest_stays_as_it_was_written(tmp_path: Path, text: str, kept: str, mark: str) -> None:
    options, left = take(tmp_path, mark + text)
    assert options in ({"use_dta": "True"}, {"use_dta": "true"})
    assert left.decode().removeprefix("\ufeff") == kept


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("use_dta: &on true\na: *on\nb: 1e-6\n", {"a": True, "b": "1e-6"}),
        ("? use_dta\n: true\n? a\n: 1\n", {"a": 1}),
        ("{a: &x 1, b: *x, use_dta: &y true, use-dta: *y}", {"a": 1, "b": 1}),
        ("use_dta: true\ndta_verify: first\n", {}),
        ("{use_dta: true}", {}),
    ],
)
def test_or_is_written_anew_with_the_same_content(tmp_path: Path, text: str, kept: dict[str, Any]) -> None:
    options, left = take(tmp_path, text)
    assert options["use_dta"] == "True" and yaml.safe_load(left) == kept


def test_json_stays_json(tmp_path: Path) -> None:
    content = {"use_dta": True, "a": {"b": [1.5, None]}, "dta_verify": "first"}
    for indent in (None, 2):
        options, left = take(tmp_path, json.dumps(content, indent=indent), "settings.json")
        assert options == {"use_dta": "True", "dta_verify": "first"} and json.loads(left) == {"a": content["a"]}


def test_every_config_counts(tmp_path: Path) -> None:
    for name, text in (("a", "use_dta: true\ndta_verify: first\nx: 1\n"), ("b", "dta_verify: 'off'\ny: 1\n")):
        (tmp_path / name).write_text(text)
    options, rest = take_yaml_options(["--config", str(tmp_path / "a"), f"--config={tmp_path / 'b'}", "--config"])
    assert {name: option.text for name, option in options.items()} == {"use_dta": "True", "dta_verify": "off"}
    assert [Path(rest[i]).read_text() for i in (1, 3)] == ["x: 1\n", "y: 1\n"] and rest[4:] == ["--config"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["train.py"],
        ["train.py", "--config"],
        ["train.py", "--config="],
        ["train.py", "--config", "missing.yaml"],
        ["train.py", "--config", "."],
        ["train.py", "--config", "plain.yaml"],
        ["train.py", "--config=empty.yaml"],
        ["train.py", "--config", "list.yaml"],
        ["train.py", "--config", "binary"],
        ["train.py", "--other", "mine.yaml"],
    ],
)
def test_leaves_other_configs_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.yaml").write_text("a: !custom [1]\nb: {use_dta: true}\n1: 2\n[3]: 4\n")
    (tmp_path / "empty.yaml").touch()
    (tmp_path / "list.yaml").write_text("- a: 1\n")
    (tmp_path / "binary").write_bytes(b"use_dta: true\n\xff")
    (tmp_path / "mine.yaml").write_text("use_dta: true\n")
    assert take_yaml_options(arguments) == ({}, arguments) and capsys.readouterr().err == ""


@pytest.mark.parametrize("text", ["use_dta: [true\n", "[training]\nuse_dta = true\n", "- use_dta: true\n"])
def test_says_what_is_no_yaml_mapping(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config").write_text(text)
    arguments = ["--config", str(tmp_path / "config")]
    assert take_yaml_options(arguments) == ({}, arguments)
    assert f"{tmp_path}/config names use_dta, but is no YAML mapping: it is left" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["use_dat", "use-dtaa", "USE_DTA"])
def test_a_slip_of_the_flag_is_pointed_out(tmp_path: Path, key: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config").write_text(f"{key}: true\nuse_data: 1\n")
    arguments = ["--config", str(tmp_path / "config")]
    assert take_yaml_options(arguments) == ({}, arguments)
    said = f"dta_plugin.run: {tmp_path}/config: {key} is left to the script. Did you mean use_dta?\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("use_dta: maybe", "use_dta='maybe'. Expected true or false."),
        ("use-dta: 2", "use-dta='2'. Expected true or false."),
        ("use_dta: null", "use_dta='None'. Expected true or false."),
        ("use_dta: {on: true}", "use_dta='{on: true}'. Expected true or false."),
        ("use_dta:\n- true", "use_dta='- true'. Expected true or false."),
        ("use_dta: !env X", "use_dta='!env 'X''. Expected true or false."),
        ("use_dta: true\ndta_verify: [first]", "dta_verify='[first]'. Expected one plain value."),
        ("use_dta: true\ndta_verify: off", "dta_verify='False'. Expected 'off', 'first' or 'every:N'"),
        ("use_dta: true\ndta-min-saving: null", "dta-min-saving='None'. Expected a value of type float."),
        ("use_dta: true\ndta_verfy: first", "dta_verfy is no option. Did you mean dta_verify? Expected among: dta_ba"),
        ("a: &x {use_dta: true}\n<<: *x", "use_dta comes from a mapping that << merges. Expected it as an entry"),
        ("<<: [{b: 1}, {dta_verify: first}]", "dta_verify comes from a mapping that << merges."),
    ],
)
def test_refuses_what_it_does_not_understand(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(InvalidInputError) as caught:
        parse_options(take_yaml_options(["--config", str(tmp_path / "bad.yaml")])[0])
    assert str(caught.value).replace('"', "'").startswith(f"{tmp_path}/bad.yaml: {complaint}")


def test_refusal_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("dta_verfy: first\nuse_dta: true\n")
    process = launch(tmp_path, "raise", "--config", "recipe.yaml")
    out, err = process.communicate()
    assert process.returncode == 1 and not out and err.count("\n") == 1
    assert err.startswith("dta_plugin.run: recipe.yaml: dta_verfy is no option. Did you mean dta_verify?")


@pytest.mark.parametrize(("how", "code"), [("return", 0), ("exit", 3), ("raise", 1), ("fork", 0)])
def test_the_copy_is_gone_with_the_process(tmp_path: Path, how: str, code: int) -> None:
    (tmp_path / "recipe.yaml").write_text("use_dta: false\nlearning_rate: 1e-6\n")
    process = launch(tmp_path, how, "--config", "recipe.yaml")
    out, err = process.communicate()
    path, text = out.split("\n", 1)
    assert process.returncode == code and text.strip() == "learning_rate: 1e-6", err
    assert_gone(path)


@pytest.mark.parametrize(("how", "code"), [("wait", -signal.SIGTERM), ("handle", 5)])
def test_sigterm_ends_the_script_as_it_would(tmp_path: Path, how: str, code: int) -> None:
    """By the signal; or as the script's own handler says."""
    (tmp_path / "recipe.yaml").write_text("use_dta: false\nlearning_rate: 1e-6\n")
    process = launch(tmp_path, how, "--config", "recipe.yaml")
    assert process.stdout is not None
    path, text = (process.stdout.readline().strip() for _ in range(2))
    assert text == "learning_rate: 1e-6" and Path(path).is_file()
    if how == "handle":
        assert (process.stdout.readline(), process.stdout.readline()) == ("\n", "ready\n")
    process.terminate()
    process.communicate()
    assert process.returncode == code
    assert_gone(path)


def assert_gone(path: str) -> None:
    folder = Path(path).parents[1]
    assert folder.name.startswith("dta_plugin_") and not folder.exists()
