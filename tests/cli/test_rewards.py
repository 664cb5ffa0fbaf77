"""What is read as the reward of a rollout, and what is said where something only looks like one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dta_plugin.cli.rollouts import read_file
from tests.cli.support import refusal, run_dta, write_rollouts

PAIR = {"prompt": "q", "completion": "a"}
MANY = {"prompt": "q", "completions": ["a", "b"]}
LOG = PAIR | {"step": 1, "advantage": 0.7}  # a trainer's log of completions

# Row, --reward, rewards, the keys that were read.
READ: dict[str, tuple[dict[str, Any], str | None, list[float | None], str]] = {
    "number": (PAIR | {"reward": 0.5}, None, [0.5], "reward"),
    "yes or no": (PAIR | {"reward": True}, None, [1.0], "reward"),
    "number as text": (PAIR | {"reward": "0.5"}, None, [0.5], "reward"),
    "score beside acc": (PAIR | {"score": 1.0, "acc": False}, None, [1.0], "score"),
    "rewards": (PAIR | {"rewards": 2}, None, [2.0], "rewards"),
    "one in a list": (PAIR | {"reward": [0.5]}, None, [0.5], "reward"),
    "a list": (MANY | {"rewards": [1, None]}, None, [1.0, None], "rewards"),
    "object with a score": (PAIR | {"reward": {"score": 1.0, "acc": True}}, None, [1.0], "reward.score"),
    "object with a total": (PAIR | {"rewards": {"a": 1, "b": 2, "total": 3}}, None, [3.0], "rewards.total"),
    "object with one number": (PAIR | {"rewards": {"acc": 1.0, "why": "right"}}, None, [1.0], "rewards.acc"),
    "objects": (MANY | {"rewards": [{"total": 1, "a": 5}, {"total": 2, "a": 5}]}, None, [1.0, 2.0], "rewards.total"),
    "a name like it": (PAIR | {"accuracy_reward": 0.5, "length": 7}, None, [0.5], "accuracy_reward"),
    "a log with one function": (LOG | {"is_right": 0.5}, None, [0.5], "is_right"),
    "a total before its parts": (PAIR | {"format_reward": 1, "reward": 3, "acc_reward": 2}, None, [3.0], "reward"),
    "asked for": (PAIR | {"reward": 1.0, "acc": 0.25}, "acc", [0.25], "acc"),
    "a sum, asked for": (LOG | {"right": 1.0, "format": 0.5}, "right,format", [1.5], "right + format"),
    "a sum without one of them": (LOG | {"right": 1.0, "format": None}, "right,step", [2.0], "right + step"),
    "within an object": (PAIR | {"rewards": {"a": 1, "b": 2}}, "rewards.b", [2.0], "rewards.b"),
    "an object, asked for": (PAIR | {"a": {"total": 3, "b": 1}}, "a", [3.0], "a.total"),
    "within objects": (MANY | {"rewards": [{"a": 1}, {"a": 2}]}, "rewards.a", [1.0, 2.0], "rewards.a"),
}

# Row, what is said.
UNREAD: dict[str, tuple[dict[str, Any], str]] = {
    "object without a total": (
        PAIR | {"rewards": {"acc": 1.0, "format": 0.5}},
        "rewards is an object of acc, format, and no total. Take one: --reward rewards.acc, or their sum: --reward "
        "rewards.acc,rewards.format.",
    ),
    "text": (PAIR | {"reward": "good"}, "reward is a text. Expected a number"),
    "not a number": (PAIR | {"reward": float("nan")}, "reward is no finite number"),
    "infinite": (PAIR | {"reward": float("inf")}, "reward is no finite number"),
    "beyond floats": (PAIR | {"reward": 10**400}, "reward is no finite number"),
    "one per token": (PAIR | {"rm_scores": [0.0, 1.0]}, "rm_scores is a list of 2. Expected a number"),
    "several functions": (
        LOG | {"accuracy": 1.0, "format_reward": 0.5},
        "the row has accuracy, format_reward, and no total. Take one: --reward accuracy",
    ),
    "an empty object": (PAIR | {"reward": {}}, "reward is an object of nothing"),
}


@pytest.mark.parametrize("name", READ)
def test_read(name: str, tmp_path: Path) -> None:
    row, asked, expected, keys = READ[name]
    found = read_file(write_rollouts(tmp_path / "rows.jsonl", [row]), reward=asked)
    assert [rollout.reward for rollout in found.rollouts] == expected
    assert found.rewards.name == keys and found.rewards.unread is None


@pytest.mark.parametrize("name", UNREAD)
def test_what_cannot_be_read_is_said(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row, expected = UNREAD[name]
    file = write_rollouts(tmp_path / "rows.jsonl", [PAIR, row, row])
    page = tmp_path / "page.html"
    code, out, err = run_dta(capsys, "inspect", file, "--html", page)
    (line,) = [line for line in out.splitlines() if line.startswith("reward")]
    assert (code, err) == (0, "") and line.startswith(f"reward not read: {file}, line 2: ") and expected in line
    assert "reward not read" in page.read_text()
    rewards = json.loads(run_dta(capsys, "inspect", file, "--json")[1])["rewards"]
    assert rewards["read_from"] is None and rewards["rollouts"] == 0 and expected in rewards["not_read"]


def test_rows_without_rewards_say_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [PAIR | {"reward": None, "reward_model": {"ground_truth": 4}, "score_text": "good"}, [1, 2]]
    for row in rows:
        out = run_dta(capsys, "inspect", write_rollouts(tmp_path / "rows.jsonl", [row]))[1]
        assert not any(line.startswith("reward") for line in out.splitlines())


def test_the_report_names_the_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [PAIR | {"score": 1}, PAIR | {"score": 0}, PAIR]
    out = run_dta(capsys, "inspect", write_rollouts(tmp_path / "rows.jsonl", rows))[1]
    assert "reward: score, known of 2 of 3, mean 0.5\n" in out


def test_a_key_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_rollouts(tmp_path / "rows.jsonl", [PAIR | {"accuracy": 1}])
    assert "no row has a number there. Did you mean accuracy?" in refusal(
        capsys, "inspect", file, "--reward", "acuracy"
    )
    assert "no row has a number there" in refusal(capsys, "inspect", file, "--reward", "prompt")
    assert "names no key" in refusal(capsys, "inspect", file, "--reward", ",")


def test_a_log_of_completions_as_parquet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet files need pyarrow")
    rows = [LOG | {"right": float(i), "format": None if i else float("nan")} for i in range(2)]
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), tmp_path / "log.parquet")
    found = read_file(tmp_path / "log.parquet", reward="right")
    assert [rollout.reward for rollout in found.rollouts] == [0.0, 1.0]
