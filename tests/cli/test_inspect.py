"""`dta inspect`: every input format, both views, groups, the report, and errors of one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from dta_plugin import __version__
from dta_plugin.cli.encoding import ByteEncoder, load_encoder, render
from dta_plugin.cli.messages import read_messages
from dta_plugin.cli.model_loading import Geometry, cost_of, skeleton
from dta_plugin.cli.rollouts import per_turn_sequences, trajectory_sequences
from dta_plugin.errors import InvalidInputError
from dta_plugin.models.introspection import model_cost
from dta_plugin.tree import PrefixTree
from tests.cli.support import (
    AIRLINE,
    THINK_STRIPPING,
    load_rollouts,
    needs_airline,
    run_dta,
    save_config,
    save_tokenizer,
    write_rollouts,
)

PROMPT = [5, 6, 7]
ANSWERS = [[1, 2], [1, 3, 4], [9]]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Sum?"},
    {"role": "assistant", "content": None, "tool_calls": [{"name": "add", "arguments": '{"x": 1}'}]},
    {"role": "tool", "content": "2"},
    {"role": "assistant", "content": "It is 2."},
]
RENDERED = [render(message) for message in read_messages(CHAT, "")]

FORMATS: dict[str, Any] = {
    "lists": lambda answer: PROMPT + answer,
    "input_ids": lambda answer: {"input_ids": PROMPT + answer},
    "tokens": lambda answer: {"tokens": PROMPT + answer, "reward": 1.0},
    "token_ids": lambda answer: {"token_ids": PROMPT + answer},
    "padded": lambda answer: {"input_ids": [0, *PROMPT, *answer], "attention_mask": [0] + [1] * (3 + len(answer))},
    "prompt_and_completion": lambda answer: {"prompt_ids": PROMPT, "completion_ids": answer},
}


def inspect_json(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    code, out, err = run_dta(capsys, "inspect", *arguments, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize("name", FORMATS)
def test_token_ids_in_every_format(name: str, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_rollouts(tmp_path / f"ids{suffix}", map(FORMATS[name], ANSWERS))
    found = inspect_json(capsys, file)
    whole = found["whole_file"]
    assert (whole["sequences"], whole["flat_tokens"], whole["tree_tokens"]) == (3, 15, 8)
    assert found["common_tokens"] == 3 and found["tokens"] == "token ids"
    assert [fork["depth"] for fork in found["forks"]] == [3, 4]


def test_equal_prompts_are_a_group(tmp_path: Path) -> None:
    rows = [{"prompt_ids": prompt, "completion_ids": [9, i]} for i, prompt in enumerate(([1, 2], [1, 3], [1, 2]))]
    rollouts = load_rollouts(write_rollouts(tmp_path / "ids.jsonl", rows))
    assert [rollout.group for rollout in rollouts] == ["1", "2", "1"]
    assert [sequence.first_scored for sequence in trajectory_sequences(rollouts, ByteEncoder())] == [2, 2, 2]


@pytest.mark.parametrize("key, option", [("task_id", None), ("uid", None), ("mine", "mine")])
def test_groups_by_key(key: str, option: str | None, tmp_path: Path) -> None:
    rows = [{key: i % 2, "tokens": [1, 2, i]} for i in range(4)]
    rollouts = load_rollouts(write_rollouts(tmp_path / "ids.jsonl", rows), group_by=option)
    assert [rollout.group for rollout in rollouts] == ["0", "1", "0", "1"]


def test_sharing_within_groups_and_over_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"uid": i // 2, "tokens": [1, 2, 3, i // 2 + 10, i + 20]} for i in range(4)]
    file = write_rollouts(tmp_path / "ids.jsonl", rows)
    found = inspect_json(capsys, file)
    assert found["within_groups"]["tree_tokens"] == 12 and found["whole_file"]["tree_tokens"] == 9
    assert found["first_forks"] == {"groups": 2, "lowest": 4, "median": 4, "highest": 4}
    assert 1 < found["within_groups"]["ceiling"] < found["whole_file"]["ceiling"]
    assert inspect_json(capsys, file, "--group", "1", "--forks", "9")["forks"][0]["group"] == "1"
    assert inspect_json(capsys, file, "--limit", "3")["rollouts"] == 3


def test_messages_are_rendered_with_roles_and_calls() -> None:
    assert RENDERED[0] == "<|system|>\nBe brief.\n"
    assert RENDERED[2] == '<|assistant|>\n\n<|call|>add {"x": 1}\n'
    nested = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"x": 1}}}]}
    parts = {"role": "user", "content": [{"type": "text", "text": "Sum?"}]}
    assert [render(message) for message in read_messages([nested, parts], "")] == [RENDERED[2], RENDERED[1]]


def test_bytes_without_a_tokenizer(tmp_path: Path) -> None:
    rollouts = load_rollouts(write_rollouts(tmp_path / "chat.jsonl", [{"messages": CHAT}]))
    (sequence,) = trajectory_sequences(rollouts, ByteEncoder())
    text = "".join(RENDERED)
    assert ByteEncoder().decode(sequence.tokens.tolist()) == text
    assert sequence.first_scored == len("".join(RENDERED[:2]))


def test_one_sequence_per_assistant_turn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_rollouts(tmp_path / "chat.jsonl", [{"task_id": 7, "messages": CHAT}])
    first, second = per_turn_sequences(load_rollouts(file), ByteEncoder())
    assert (first.tokens == second.tokens[: len(first.tokens)]).all()
    assert second.first_scored == len("".join(RENDERED[:4]))
    found = inspect_json(capsys, file, "--per-turn")
    assert (found["whole_file"]["sequences"], found["first_forks"]) == (2, None)
    assert found["whole_file"]["tree_tokens"] == len(second.tokens)


@pytest.mark.parametrize("keys", [("prompt", "completion"), ("input", "output")])
def test_texts_and_conversations_in_two_parts(keys: tuple[str, str], tmp_path: Path) -> None:
    rows = [{keys[0]: "2+2=", keys[1]: "4"}, {keys[0]: CHAT[:2], keys[1]: CHAT[2:]}]
    text, chat = trajectory_sequences(load_rollouts(write_rollouts(tmp_path / "two.jsonl", rows)), ByteEncoder())
    assert (bytes(text.tokens.tolist()), text.first_scored) == (b"2+2=4", 4)
    assert chat.first_scored == len("".join(RENDERED[:2]))


def test_tokenizer_without_template_renders_plainly(tmp_path: Path) -> None:
    words, chat = "".join(RENDERED), read_messages(CHAT, "")
    encoder = load_encoder(str(save_tokenizer(tmp_path, words)))
    tokens, prompt = encoder.chat(chat, 2)
    assert (len(tokens), prompt) == (len(words.split()), 5) and "no template" in encoder.description
    from_file = load_encoder(str(tmp_path / "tokenizer.json"))
    assert (from_file.chat(chat, 2)[0] == tokens).all()


def test_chat_template_is_used(tmp_path: Path) -> None:
    words = "<system> <user> <assistant> <tool> Be brief. Sum? add 1 2 It is 2."
    encoder = load_encoder(str(save_tokenizer(tmp_path, words, THINK_STRIPPING)))
    tokens, prompt = encoder.chat(read_messages(CHAT, ""), 2)
    expected = "<system> Be brief. </s> <user> Sum? </s> <assistant> add 1 </s> <tool> 2 </s> <assistant> It is 2. </s>"
    assert encoder.decode(tokens.tolist()) == expected
    assert prompt == 8  # the generation prompt belongs to the prompt


def test_report_finds_stripped_thinking(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "<user> <assistant> Sum? More? <think> easy </think> 2 3"
    save_tokenizer(tmp_path, words, THINK_STRIPPING)
    messages = [
        {"role": "user", "content": "Sum?"},
        {"role": "assistant", "content": "<think> easy </think> 2"},
        {"role": "user", "content": "More?"},
        {"role": "assistant", "content": "<think> easy </think> 3"},
    ]
    file = write_rollouts(tmp_path / "chat.jsonl", [{"messages": messages}])
    code, out, _ = run_dta(capsys, "inspect", file, "--per-turn", "--tokenizer", tmp_path)
    assert code == 0 and "a <think> block in some branches only" in out


def test_a_template_that_refuses_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tokenizer(tmp_path, "a", "{{ raise_exception('roles must alternate') }}")
    file = write_rollouts(tmp_path / "chat.jsonl", [{"messages": CHAT}])
    code, _, err = run_dta(capsys, "inspect", file, "--tokenizer", tmp_path)
    assert code == 2 and "roles must alternate" in err and err.count("\n") == 1


def test_text_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"task_id": i // 2, "tokens": [*range(3, 103), i // 2, *range(40), i]} for i in range(4)]
    file = write_rollouts(tmp_path / "ids.jsonl", rows)
    code, out, err = run_dta(capsys, "inspect", file, "--svg", tmp_path / "tree.svg")
    assert (code, err) == (0, "")
    for line in (
        "ids.jsonl: 4 rollouts in 2 groups (by task_id)",
        "group             2          4           568           286    1.99x",
        "All 2 groups begin with the same 100 tokens.",
        "Within a group, sequences first part after 141 tokens (median; 141 to 141).",
        "Group 0: 2 sequences, 1.99x",
    ):
        assert line in out
    assert max(map(len, out.splitlines()[:-1])) <= 101 and len(out.splitlines()) < 40
    ElementTree.parse(tmp_path / "tree.svg")


def test_default_geometry_is_qwen3_0_6b(tmp_path: Path) -> None:
    sizes = {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8}
    sizes |= {"head_dim": 128, "intermediate_size": 3072, "vocab_size": 151936}
    path = save_config(tmp_path, "qwen3", tie_word_embeddings=True, **sizes)
    assert Geometry().cost() == model_cost(skeleton(str(path))) == cost_of(str(path), None)[0]


def test_geometry_by_hand() -> None:
    assert Geometry.parse("layers=2, hidden=8") == Geometry(layers=2, hidden=8)
    for text in ("layers", "layers=0", "depth=3", "layers=x"):
        with pytest.raises(InvalidInputError, match="Expected SIZE=NUMBER"):
            Geometry.parse(text)


@pytest.mark.parametrize(
    "content, expected",
    [
        ("", "no rollouts"),
        ("[1, 2]\n{oops\n", "line 2 is not JSON"),
        ("[1, 2.5]\n", "line 1 has token ids"),
        ('"text"\n', "line 1 is a str"),
        ('{"a": 1}\n', "line 1 has the keys a"),
        ('{"messages": "hello"}\n', "no list of objects with a role"),
        ('{"uid": 1, "tokens": [1]}\n{"tokens": [1]}\n', "line 2 has the keys tokens. Expected 'uid'"),
        ("[]\n", "line 1 is empty: no token ids"),
        ("[-100, 4]\n", "line 1 has token ids from -100 to 4"),
    ],
)
def test_unusable_files_end_in_one_line(
    content: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(content)
    code, out, err = run_dta(capsys, "inspect", file)
    assert code == 2 and out == "" and err.count("\n") == 1
    assert err.startswith("dta inspect: ") and expected in err


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--per-turn"], "Expected `messages`"),
        (["--group", "x"], "There is no group 'x'"),
        (["--group-by", "uid"], "a bare list"),
        (["--forks", "-1"], "--forks -1"),
        (["--limit", "0"], "limit=0"),
        (["--tokenizer", "./nowhere"], "does not exist"),
        (["--model", "./nowhere"], "does not exist"),
        (["--svg", "./no/such/folder/x.svg"], "cannot be written"),
        (["--model", "x", "--geometry", "layers=1"], "Expected one of them"),
    ],
)
def test_unusable_options_end_in_one_line(
    options: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_rollouts(tmp_path / "ids.jsonl", [[1, 2], [1, 3]])
    code, _, err = run_dta(capsys, "inspect", file, *options)
    assert code == 2 and expected in err and err.count("\n") == 1


def test_missing_file(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run_dta(capsys, "inspect", "nowhere.jsonl")
    assert code == 2 and "No such file" in err


def test_the_command_itself() -> None:
    def dta(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "dta_plugin.cli", *arguments], capture_output=True, text=True)

    assert dta("--version").stdout.strip() == f"dta-plugin {__version__}"
    assert "examples:" in dta("inspect", "--help").stdout
    assert dta("inspect", "nowhere.jsonl").returncode == 2


@needs_airline
def test_airline_trajectories() -> None:
    rollouts = load_rollouts(AIRLINE)
    assert len(rollouts) == 100 and len({rollout.group for rollout in rollouts}) == 25
    turns = sum(message["role"] == "assistant" for rollout in rollouts for message in rollout.messages or [])
    few = [rollout for rollout in rollouts if rollout.group in ("0", "1", "2")]
    whole, per_turn = trajectory_sequences(few, ByteEncoder()), per_turn_sequences(few, ByteEncoder())
    assert turns == 1381 and len(whole) == 12
    assert 1.2 < PrefixTree.from_sequences([sequence.tokens for sequence in whole]).compression_ratio < 3
    assert PrefixTree.from_sequences([sequence.tokens for sequence in per_turn]).compression_ratio > 10
    assert all(sequence.first_scored < len(sequence.tokens) for sequence in per_turn)


@needs_airline
def test_airline_report(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run_dta(capsys, "inspect", AIRLINE, "--limit", "30", "--group", "3")
    assert code == 0 and "30 rollouts in 25 groups (by task_id)" in out and "UTF-8 bytes as tokens" in out
    assert "Group 3: 2 sequences" in out


def test_groups_that_hold_one_rollout_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A key that names rollouts, not prompts, hides what siblings share: it is said, and what to do helps."""
    rows = [{"uid": f"r{i}", "prompt": f"question {i // 3}", "completion": f"answer {i}"} for i in range(6)]
    file = write_rollouts(tmp_path / "rows.jsonl", rows)
    out = run_dta(capsys, "inspect", file)[1]
    assert "6 groups (by uid)" in out and "No two rollouts have the same uid" in out
    assert "--group-by 'equal prompts'" in out
    out = run_dta(capsys, "inspect", file, "--group-by", "equal prompts")[1]
    assert "2 groups (by equal prompts)" in out and "No two rollouts" not in out
    nested = [{"extra": {"index": i // 3}} | row for i, row in enumerate(rows)]
    out = run_dta(capsys, "inspect", write_rollouts(file, nested), "--group-by", "extra.index")[1]
    assert "2 groups (by extra.index)" in out
