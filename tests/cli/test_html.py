"""The page of `dta inspect --html`: what it holds, what it leaves out and says so, and that text in it stays text."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dta_plugin.cli import page_data
from dta_plugin.cli.inspect_html import page
from dta_plugin.cli.page_data import _kept, _most_tokens
from dta_plugin.tree import PrefixTree
from dta_plugin.tree.picture import draw_svg
from dta_plugin.tree.stretches import Stretches
from tests.cli.support import AIRLINE, needs_airline, refusal, run_dta, save_tokenizer, write_rollouts
from tests.support.trees import SHAPES, WIDE

HOSTILE = [
    "</script><script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    "<!-- <script>",
    "]]></style>",
    "{{data}}{{policy}}",
    "\u202egnitirw\u2066",
    "\x00\x1b[31m\x7f",
    "\ud800 half a pair",
    "\u2028\u2029\u200b",
]


class Elements(HTMLParser):
    """Every element of a page with its attributes and, of scripts and styles, its content."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.is_open = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs), []))
        self.is_open = tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self.is_open = False

    def handle_data(self, data: str) -> None:
        if self.is_open:
            self.found[-1][2].append(data)

    def all(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        return [(attributes, "".join(content)) for name, attributes, content in self.found if name == tag]


def written(capsys: pytest.CaptureFixture[str], file: Path, *options: str | Path) -> str:
    target = file.with_name("page.html")
    code, out, err = run_dta(capsys, "inspect", file, "--html", target, *options)
    assert (code, err) == (0, "") and out.endswith(f"wrote {target}\n")
    return target.read_text(encoding="utf-8")


def data_of(text: str) -> dict[str, Any]:
    (script,) = [content for attributes, content in Elements(text).all("script") if attributes.get("id") == "data"]
    return json.loads(script)


def text_of(group: dict[str, Any], sequence: int) -> str:
    """A sequence's text, put together from the nodes above its end."""
    node, parts = group["ends"][sequence], []
    while node >= 0:
        parts.append(group["text"][node])
        node = group["parent"][node]
    return "".join(reversed(parts))


@pytest.mark.parametrize("name", {**SHAPES, **WIDE})
def test_stretches_hold_every_sequence(name: str) -> None:
    sequences = {**SHAPES, **WIDE}[name]
    tree = PrefixTree.from_sequences(sequences)
    found = Stretches.from_tree(tree)
    assert found.tokens.sum() == tree.tree_tokens and (found.tokens * found.sequences).sum() == tree.flat_tokens
    for sequence, end in zip(sequences, found.ends.tolist(), strict=True):
        parts = []
        while end >= 0:
            parts.append(tree.tokens[found.starts[end] : found.starts[end] + found.tokens[end]])
            end = int(found.parent[end])
        assert np.concatenate(parts[::-1]).tolist() == list(sequence)


def test_each_group_shows_what_tells_it_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A piece of its text from shortly before it parts from the group most like it, in whatever order they come."""
    same = "You are a helpful assistant. " * 5
    prompts = [f"{same}What is the capital of {name}?" for name in ("Peru", "Chad", "Peru, in Spanish")]
    file = write_rollouts(tmp_path / "rows.jsonl", [{"prompt": p, "completion": "Lima"} for p in [*prompts, "Hi"]])

    def openings(*options: str) -> list[str]:
        return [group["opening"] for group in data_of(written(capsys, file, *options))["groups"]]

    peru, chad, spanish, other = openings()
    assert peru.endswith("of Peru?Lima") and "Chad?Lima" in chad and "Peru, in Spanish" in spanish
    assert other == "HiLima" and same not in peru
    assert openings("--html-mb", "0") == [""] * 4
    monkeypatch.setattr(page_data, "_SEARCHED", 100)  # many tokens: from where all part
    assert openings()[0] == (prompts[0] + "Lima")[: page_data._OPENING]


def test_every_sequence_is_on_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"uid": f"g{i % 3}", "prompt": f"Sum {i % 3}? ", "completion": f"It is {i // 4}.", "reward": i / 8}
        for i in range(12)
    ]
    data = data_of(written(capsys, write_rollouts(tmp_path / "rows.jsonl", rows)))
    assert [group["name"] for group in data["groups"]] == ["g0", "g1", "g2"] and data["notes"] == []
    for number, group in enumerate(data["groups"]):
        own = rows[number::3]
        assert [text_of(group, i) for i in range(4)] == [row["prompt"] + row["completion"] for row in own]
        assert group["reward"] == [row["reward"] for row in own]
        assert group["where"] == [f"rows.jsonl, line {number + 3 * i + 1}" for i in range(4)]
        pairs = zip(group["tokens"], group["through"], strict=True)
        assert sum(tokens * through for tokens, through in pairs) == group["flat"]
        assert sum(group["tokens"]) == group["tree"] and group["forks"]
    totals = data["within"]
    assert sum(group["dense"] for group in data["groups"]) == pytest.approx(totals["dense_flops"])
    assert sum(group["cheap"] for group in data["groups"]) == pytest.approx(totals["tree_flops"])


def test_forks_are_those_of_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    phrase = " ".join(f"word{i}" for i in range(30))
    rows = [{"uid": 1, "prompt": "At ", "completion": f"{hour}:00 {phrase}"} for hour in (7, 8)]
    file = write_rollouts(tmp_path / "rows.jsonl", rows)
    (group,) = data_of(written(capsys, file))["groups"]
    code, out, _ = run_dta(capsys, "inspect", file, "--json")
    (fork,) = json.loads(out)["forks"]
    assert code == 0 and fork["repeated"] > 100
    node, repeated, apart, cause, tokens, after, text = group["forks"][0]
    assert (repeated, apart, cause) == (fork["repeated"], fork["apart"], fork["cause"])
    assert {"tokens": tokens, "after": after, "text": text} == fork["longest_repeat"]
    assert sum(group["tokens"][: node + 1]) == fork["depth"]


@pytest.mark.parametrize(
    "given, expected",
    [(0.5, 0.5), (True, 1.0), ("high", None), (None, None), (float("nan"), None), (10**400, None), ([1, 2, 3], None)],
)
@pytest.mark.parametrize("key", ["reward", "score"])
def test_rewards(key: str, given: Any, expected: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (group,) = data_of(written(capsys, write_rollouts(tmp_path / "ids.jsonl", [{"tokens": [1, 2], key: given}])))[
        "groups"
    ]
    assert group["reward"] == [expected]


def test_a_reward_per_completion(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"prompt": "2+2=", "completions": ["4", "5"], "reward": [1, 0]}
    (group,) = data_of(written(capsys, write_rollouts(tmp_path / "rows.jsonl", [row])))["groups"]
    assert group["reward"] == [1, 0]


def test_turns_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat = [{"role": role, "content": role} for role in ("user", "assistant", "user", "assistant")]
    file = write_rollouts(tmp_path / "chat.jsonl", [{"messages": chat, "reward": 1}])
    (group,) = data_of(written(capsys, file, "--per-turn"))["groups"]
    assert group["where"] == ["chat.jsonl, line 1, message 2", "chat.jsonl, line 1, message 4"]
    assert group["reward"] == [1, 1] and group["through"] == [2, 1]


def test_token_ids_without_a_tokenizer_are_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_rollouts(tmp_path / "ids.jsonl", [[5, 6, 7], [5, 6, 8]])
    data = data_of(written(capsys, file))
    assert data["groups"][0]["text"] == ["5 6", "7", "8"] and not data["has_text"]
    save_tokenizer(tmp_path, "a b c d e f g h")
    data = data_of(written(capsys, file, "--tokenizer", tmp_path))
    assert data["groups"][0]["text"] == ["d e", "f", "g"] and data["has_text"]


def test_hostile_text_is_only_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"uid": text, "prompt": text, "completion": text, "reward": 1} for text in HOSTILE]
    file = write_rollouts(tmp_path / "<img src=x onerror=alert(1)>.jsonl", rows)
    text = written(capsys, file)
    plain = written(capsys, write_rollouts(tmp_path / "plain.jsonl", [[1, 2]]))
    names = [(tag, attributes.get("id")) for tag, attributes, _ in Elements(text).found]
    assert names == [(tag, attributes.get("id")) for tag, attributes, _ in Elements(plain).found]
    groups = data_of(text)["groups"]
    assert [group["name"] for group in groups] == HOSTILE
    assert text_of(groups[0], 0) == HOSTILE[0] * 2 and text_of(groups[5], 0) == HOSTILE[5] * 2
    data = text[text.index('id="data">') + 10 :]
    data = data[: data.index("</script>")]
    assert data.isascii() and "<" not in data and data.isprintable()


def test_nothing_is_loaded_and_no_other_script_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = written(capsys, write_rollouts(tmp_path / "ids.jsonl", [[1, 2], [1, 3]]))
    elements = Elements(text)
    (policy,) = [a["content"] for a, _ in elements.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    allowed = dict(part.strip().split(" ", 1) for part in str(policy).split(";"))
    assert allowed["default-src"] == "'none'" and set(allowed) == {
        *("default-src", "style-src", "script-src", "base-uri", "form-action")
    }
    for tag in ("style", "script"):
        content = elements.all(tag)[-1][1]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert allowed[f"{tag}-src"] == f"'sha256-{digest}'"
    assert not re.search(r"https?:|//[a-z]+\.", re.sub(r"^\s*//.*$", "", text, flags=re.MULTILINE))
    for _, attributes, _ in elements.found:
        assert not {"src", "href", "style"} & set(attributes) and not any(name.startswith("on") for name in attributes)
    script = elements.all("script")[-1][1]
    for unsafe in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "fetch(", "XMLHttp"):
        assert unsafe not in script


def test_numbers_that_json_does_not_have_are_refused() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        page("", {"value": float("nan")})


def test_long_texts_lose_their_middle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"uid": 1, "prompt": "Q", "completion": "a" + "b" * 30_000 + "c"},
        {"uid": 1, "prompt": "Q", "completion": "d"},
    ]
    file = write_rollouts(tmp_path / "rows.jsonl", rows)
    text = written(capsys, file, "--html-mb", "0.002")
    data = data_of(text)
    (note,) = data["notes"]
    assert "--html-mb" in note and "About 0.002 MB" in note
    cut = next(each for each in data["groups"][0]["text"] if not isinstance(each, str))
    assert cut[0].startswith("ab") and cut[2].endswith("bc")
    assert len(cut[0]) + cut[1] + len(cut[2]) == 30_002 and f"{cut[1]:,} tokens" in note
    assert len(cut[0]) + len(cut[2]) <= 2000
    whole = data_of(written(capsys, file))
    assert whole["notes"] == [] and all(isinstance(each, str) for each in whole["groups"][0]["text"])


def test_small_nodes_are_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"uid": i % 2, "tokens": [9, 9, 10 + i, *range(i)]} for i in range(40)]
    file = write_rollouts(tmp_path / "ids.jsonl", rows)
    data = data_of(written(capsys, file, "--html-nodes", "10"))
    assert "32 smaller ones are left out" in data["notes"][0] and "--html-nodes" in data["notes"][0]
    assert sum(len(group["parent"]) for group in data["groups"]) == 10
    for group in data["groups"]:
        assert sum(group["tokens"]) + sum(tokens for _, tokens in group["below"].values()) == group["tree"]
        children = len(group["parent"]) - 1 + sum(count for count, _ in group["below"].values())
        assert children == 20 and group["ends"].count(-1) == group["below"]["0"][0]
    one = data_of(written(capsys, file, "--html-nodes", "30", "--group", "1"))
    assert [group["name"] for group in one["groups"]] == ["1"] and "Only one of 2 groups" in one["notes"][0]
    assert len(one["notes"]) == 1


def test_groups_beyond_what_a_page_can_hold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"uid": i // 2, "tokens": [*range(i // 2), 99, i]} for i in range(12)]
    file = write_rollouts(tmp_path / "ids.jsonl", rows)
    monkeypatch.setattr(page_data, "_SEQUENCES", 5)
    monkeypatch.setattr(page_data, "_SEARCHED", 8)
    data = data_of(written(capsys, file))
    assert [group["name"] for group in data["groups"]] == ["4", "5"] and data["within"]["trees"] == 6
    assert [group["forks"] is None for group in data["groups"]] == [True, False]
    assert "4 others are left out. Any of them with --group" in data["notes"][0] and "in 1 others" in data["notes"][1]
    assert [group["name"] for group in data_of(written(capsys, file, "--group", "0"))["groups"]] == ["0"]


@pytest.mark.parametrize("seed", range(5))
def test_kept_nodes_have_their_parents(seed: int) -> None:
    draw = np.random.default_rng(seed)
    trees = [
        Stretches.from_tree(PrefixTree.from_sequences([draw.integers(0, 2, 9).tolist() for _ in range(30)]))
        for _ in range(3)
    ]
    for limit in (0, 1, 7, 40, 1000):
        kept = _kept(trees, limit)
        assert sum(map(len, kept)) == min(limit, sum(map(len, trees)))
        for tree, own in zip(trees, kept, strict=True):
            assert set(tree.parent[own].tolist()) <= {-1, *own.tolist()}


@pytest.mark.parametrize("limit", [0, 1, 5, 12, 37, 38, 100])
def test_text_is_shared_out_evenly(limit: int) -> None:
    lengths = np.array([1, 20, 3, 3, 11])
    most = _most_tokens(lengths, limit)
    assert np.minimum(lengths, most).sum() <= limit
    assert most == 20 or np.minimum(lengths, most + 1).sum() > limit


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--html", "./no/such/folder/x.html"], "its folder does not exist. Expected a file name for --html"),
        (["--html", "."], "a folder. Expected a file name for --html"),
        (["--html", "x.html", "--html-nodes", "0"], "--html-nodes 0"),
        (["--html", "x.html", "--html-mb", "nan"], "--html-mb nan"),
    ],
)
def test_unusable_outputs_are_refused_before_reading(
    options: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in refusal(capsys, "inspect", "nowhere.jsonl", *options)


def test_a_picture_of_many_sequences_is_capped() -> None:
    draw = np.random.default_rng(0)
    tree = PrefixTree.from_sequences([[1, *draw.integers(0, 50, 6).tolist()] for _ in range(6000)])
    svg = draw_svg(tree)
    boxes = len(Stretches.from_tree(tree))
    assert svg.count("<title>") == 5000 < boxes and f"{boxes - 5000:,} smaller boxes (" in svg
    assert len(svg) < 1_500_000 and "left out" not in draw_svg(PrefixTree.from_sequences([[1, 2], [1, 3]]))


@needs_airline
def test_recorded_rollouts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "page.html"
    assert run_dta(capsys, "inspect", AIRLINE, "--per-turn", "--html", target)[0] == 0
    data = data_of(target.read_text())
    assert len(data["groups"]) == 25 and data["notes"] == [] and target.stat().st_size < 3_000_000
    assert sum(len(group["ends"]) for group in data["groups"]) == 1381
    assert {reward for group in data["groups"] for reward in group["reward"]} == {0.0, 1.0}
