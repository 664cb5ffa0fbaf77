"""`dta_picture`: real trainings draw their first tree, packed, in chunks, of a whole window, offline; and say where."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from trl import DPOTrainer, GRPOConfig, GRPOTrainer, SFTTrainer, TrlParser

from dta_plugin import TreeConfig
from dta_plugin.adapters.trl import TreeDPOTrainer, TreeGRPOConfig, TreeGRPOTrainer
from dta_plugin.errors import InvalidInputError
from dta_plugin.tree import PrefixTree, picture
from dta_plugin.tree.picture import draw_svg
from tests.adapters.trl.support import enabled, train
from tests.adapters.trl.test_offline import run

WINDOW = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "dta_merge_window": "always"}
# Beside options of the trainer, what the report says of the tree.
ONLINE: dict[str, tuple[dict[str, Any], str]] = {
    "packed": ({}, "packed on "),
    "streamed": ({"dta_max_tree_tokens_per_chunk": 40}, "streamed on "),
    "window": (WINDOW, "packed on "),
    "streamed_window": (WINDOW | {"dta_max_tree_tokens_per_chunk": 40}, "streamed on "),
    "pruned": ({"dta_prune": "always", "loss_type": "grpo", "max_steps": 3}, "packed on "),
}


@pytest.fixture(autouse=True)
def loud(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.INFO, "dta_plugin"):
        yield


def check(file: Path, caplog: pytest.LogCaptureFixture) -> str:
    """The report whose tree is in the file, and no other: as many sequences and tokens, and said once."""
    (line,) = [line for line in caplog.messages if "x shared, up to" in line]
    (drawn,) = [line for line in caplog.messages if "drawn in" in line]
    assert drawn == f"dta: the first tree is drawn in {file}"
    sequences, flat, tree = map(int, re.findall(r"dta: (\d+) sequences, (\d+) -> (\d+) tokens", line)[0])
    image = ElementTree.parse(file).getroot()
    heading = next(element.text for element in image if element.tag.endswith("text"))
    assert heading is not None and f"{sequences:,} sequences, {flat:,} tokens, {tree:,} computed (" in heading
    boxes = [element for element in image if len(element)]  # those with a title
    counts = [
        re.findall(r"([\d,]+) tokens from position .*, ([\d,]+) sequences", box[0].text or "")[0] for box in boxes
    ]
    assert sum(int(tokens) for tokens, _ in counts) == tree
    assert sum(int(tokens) * int(rows) for tokens, rows in counts) == flat
    return line


@pytest.mark.parametrize("name", ONLINE)
def test_online(name: str, model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options, how = ONLINE[name]
    file = tmp_path / "pictures" / "tree.svg"
    train(model, tmp_path, TreeGRPOTrainer, TreeGRPOConfig, dta_picture=str(file), **{"max_steps": 2, **options})
    line = check(file, caplog)
    assert how in line and line.startswith("dta: 8 sequences")


def test_the_check_sees_another_tree(
    model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control."""
    file, another = tmp_path / "tree.svg", PrefixTree.from_sequences([[5, 6], [5, 7]])
    monkeypatch.setattr(picture, "draw_svg", lambda tree, title: draw_svg(another, title))
    train(model, tmp_path, TreeGRPOTrainer, TreeGRPOConfig, dta_picture=str(file), max_steps=1)
    with pytest.raises(AssertionError):
        check(file, caplog)


def test_by_enable(model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "tree.svg"
    file.write_text("an older one")
    with enabled(picture=str(file)):
        train(model, tmp_path, GRPOTrainer, GRPOConfig, max_steps=1)
    check(file, caplog)


@pytest.mark.parametrize("trainer_class", [DPOTrainer, SFTTrainer])
def test_offline_by_the_flag(trainer_class: type, model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "tree.svg"
    with enabled(picture=str(file)):
        run(trainer_class, model, tmp_path)
    check(file, caplog)
    assert "does nothing in" not in caplog.text


def test_offline_by_a_class(model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "tree.svg"
    run(type("Drawn", (TreeDPOTrainer,), {"tree_config": TreeConfig(picture=str(file))}), model, tmp_path)
    check(file, caplog)


def test_a_training_without_a_tree_says_that_nothing_is_drawn(
    model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What is in the file is of another training."""
    file = tmp_path / "tree.svg"
    file.write_text("an older one")
    gate = {"dta_min_saving": 0.9, "dta_prune": "never", "max_steps": 1}
    train(model, tmp_path, TreeGRPOTrainer, TreeGRPOConfig, dta_picture=str(file), **gate)
    with enabled(picture=str(file), min_saving=0.9):
        run(SFTTrainer, model, tmp_path)
    with enabled(picture=str(file)):
        run(SFTTrainer, model, tmp_path, packing=True, max_length=32)
    said = [line for line in caplog.messages if line.startswith("dta: use_dta d")]
    assert len(said) == 3 and all(f", {file} is not drawn: " in line for line in said), said
    assert file.read_text() == "an older one"


def test_a_path_that_can_no_longer_be_written_does_not_end_a_training(
    model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "tree.svg"

    def in_the_way(trainer: Any) -> None:
        file.mkdir()

    result = train(model, tmp_path, TreeGRPOTrainer, TreeGRPOConfig, in_the_way, dta_picture=str(file), max_steps=2)
    assert len(result.metrics) == 2 and caplog.text.count(f"NOT drawn: {file} cannot be written (") == 1


def test_the_command_line_and_wrong_files(tmp_path: Path) -> None:
    arguments = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false"]
    (config,) = TrlParser(TreeGRPOConfig).parse_args_and_config([*arguments, "--dta_picture", "tree.svg"])
    assert config.dta_picture == "tree.svg"
    with pytest.raises(InvalidInputError, match=r"picture='tree.jpg'. Expected a file that ends in .svg"):
        TrlParser(TreeGRPOConfig).parse_args_and_config([*arguments, "--dta_picture", "tree.jpg"])
