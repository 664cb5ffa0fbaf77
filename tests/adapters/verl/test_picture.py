"""`picture`: verl's engines draw the first tree of an update, rank 0 alone, and a critic none."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("verl", reason="verl is not installed; it needs an environment of its own")

from omegaconf import OmegaConf

from dta_plugin.adapters.verl_plugin import critic
from dta_plugin.adapters.verl_plugin.config import KEY, tree_config
from dta_plugin.config import TreeConfig
from dta_plugin.errors import InvalidInputError
from tests.adapters.verl import critics
from tests.adapters.verl.support import Setup, Step, build, train


@pytest.fixture(autouse=True)
def loud(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.INFO, "dta_plugin"):
        yield


@pytest.mark.parametrize("how", ["packed", "streamed"])
def test_the_first_tree_of_an_update(how: str, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of old log-probs, which come before, none is drawn; nor of the steps that come after."""
    file = tmp_path / "pictures" / "tree.svg"
    chunks = {"max_tree_tokens_per_chunk": 20} if how == "streamed" else {}
    config = TreeConfig(executor=how, picture=str(file), **chunks)  # type: ignore[arg-type]
    train(build(Setup("fsdp2"), folder, tree=True), [Step(config=config), Step(shape="turns", config=config)])
    (line,) = [line for line in caplog.messages if "x shared, up to" in line]
    sequences, flat, tree = map(int, re.findall(r"dta: (\d+) sequences, (\d+) -> (\d+) tokens", line)[0])
    assert how in line
    assert f"{sequences:,} sequences, {flat:,} tokens, {tree:,} computed (" in file.read_text()
    assert caplog.messages.count(f"dta: the first tree is drawn in {file}") == 1


def test_other_ranks_draw_nothing(folder: Path, tmp_path: Path) -> None:
    engine = build(Setup(), folder, tree=True)
    engine._dta_notices.speaks = False  # as on all ranks but the first
    train(engine, [Step(config=TreeConfig(picture=str(tmp_path / "tree.svg")))])
    assert not [*tmp_path.rglob("*.svg")]


def test_a_critic_leaves_the_file_to_the_actor(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "tree.svg"
    critic.configure(TreeConfig(picture=str(file)))
    try:
        critics.train(critics.build_critic(Setup(), critics.save_critic(folder), True), [Step()])
    finally:
        critic.configure(TreeConfig())
    assert caplog.text.count("critic: ") == 1 and not file.exists()


def test_by_verls_setting() -> None:
    assert tree_config(_rollout("tree.svg")) == TreeConfig(picture="tree.svg")
    with pytest.raises(InvalidInputError, match=rf"^{KEY}.picture='tree.png'. Expected a file that ends in .svg"):
        tree_config(_rollout("tree.png"))


def _rollout(picture: str) -> object:
    return OmegaConf.create({"custom": {"dta": {"picture": picture}}})
