"""`_balance_batch` of verl's own trainer classes: what an order of rows keeps, and what happens where it cannot."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

pytest.importorskip("verl", reason="verl is not installed; it needs an environment of its own")

from verl.trainer.ppo import padding_utils
from verl.utils import transferqueue_utils

from dta_plugin import InvalidInputError, PrefixTree
from dta_plugin.adapters.verl_plugin import balance, groups
from dta_plugin.errors import UnsupportedError
from tests.adapters.verl.batches import (
    Queue,
    Row,
    data_proto,
    in_random_order,
    kv_batch,
    shares_of,
    star_rows,
    trainer,
    turn_rows,
)

VERSIONS = ["v1", "v0"]


@pytest.fixture(autouse=True)
def stock_afterwards() -> Any:
    yield
    balance.uninstall()


def queue_with(rows: Sequence[Row], monkeypatch: pytest.MonkeyPatch) -> Queue:
    queue = Queue(rows)
    monkeypatch.setattr(padding_utils, "tq", queue)
    monkeypatch.setattr(transferqueue_utils, "tq", queue)
    return queue


def balanced(version: str, rows: Sequence[Row], metrics: dict[str, Any], one: Any) -> list[Row | None]:
    """The rows in the order that the trainer leaves them in; None for a padding row."""
    if version == "v1":
        by_key = {row.key: row for row in rows}
        result = one._balance_batch(kv_batch(rows), metrics=metrics)
        for key, tag in zip(result.keys, result.tags, strict=True):  # tags go along
            assert tag.get("is_padding") or tag["seq_len"] == len(by_key[key].tokens)
        return [by_key.get(key) for key in result.keys]
    batch = data_proto(rows)
    assert one._balance_batch(batch, metrics=metrics) is None
    found = [rows[place] for place in batch.batch["place"].tolist()]
    assert [row.uid for row in found] == batch.non_tensor_batch["uid"].tolist()
    return found


def places_of(shares: list[list[list[Row | None]]]) -> dict[str, set[tuple[int, int]]]:
    """Per uid the shares, (step, rank), that have rows of it."""
    places = defaultdict(set)
    for step, ranks in enumerate(shares):
        for rank, rows in enumerate(ranks):
            for row in rows:
                if row is not None:
                    places[row.uid].add((step, rank))
    return places


def siblings_are_neighbours(shares: list[list[list[Row | None]]]) -> bool:
    for share in (share for step in shares for share in step):
        uids = [row.uid for row in share if row is not None]
        if sum(a != b for a, b in pairwise(uids)) != len(set(uids)) - 1:
            return False
    return True


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_groups_stay_whole(version: str, ranks: int) -> None:
    rows = in_random_order(star_rows(16, 4, prompt=60, median=40))
    metrics: dict[str, Any] = {}
    found = balanced(version, rows, metrics, trainer(version, ranks, mini_batch=8, n=4))
    assert sorted(row.key for row in found) == sorted(row.key for row in rows)
    shares = shares_of(found, ranks, steps=2)
    places = places_of(shares)
    assert all(len(place) == 1 for place in places.values()) and siblings_are_neighbours(shares)
    # The groups of a step are those that were sampled first, whatever they cost.
    order = list(dict.fromkeys(row.uid for row in rows))
    assert [{step for step, _ in places[uid]} for uid in order] == [{0}] * 8 + [{1}] * 8
    assert metrics["dta/groups"] == 16 and metrics["dta/groups_split"] == 0
    assert metrics["dta/token_reduction_of_shares"] == metrics["dta/token_reduction_ideal"] > 1
    assert 1 <= metrics["dta/rank_load_predicted"] < 1.4  # two groups per rank and step, of very different lengths


def test_whole_groups_that_would_cost_more_than_they_save_are_cut() -> None:
    """Two groups per rank of very different lengths, and next to nothing to share."""
    rows = in_random_order(star_rows(16, 4, prompt=6, median=40))
    metrics: dict[str, Any] = {}
    balanced("v1", rows, metrics, trainer("v1", 4, mini_batch=8, n=4))
    assert metrics["dta/groups_split"] > 0 and metrics["dta/rank_load_predicted"] < 1.02


@pytest.mark.parametrize("version", VERSIONS)
def test_stock_tears_groups_apart(version: str) -> None:
    """Negative control: the checks above see what verl's own order does."""
    rows = in_random_order(star_rows(16, 4, prompt=6, median=40))
    metrics: dict[str, Any] = {}
    found = balanced(version, rows, metrics, trainer(version, 2, mini_batch=8, n=4, use_dta=False))
    places = places_of(shares_of(found, 2, steps=2))
    assert sum(len(place) > 1 for place in places.values()) > 8
    assert not any(key.startswith("dta/") for key in metrics)


@pytest.mark.parametrize("version", VERSIONS)
def test_metrics_are_those_of_built_trees(version: str) -> None:
    rows = in_random_order(star_rows(8, 4, prompt=30, median=20))
    metrics: dict[str, Any] = {}
    found = balanced(version, rows, metrics, trainer(version, 2, mini_batch=8, n=4))
    tree = PrefixTree.from_sequences([row.tokens for row in rows])
    assert metrics["dta/token_reduction_ideal"] == pytest.approx(tree.compression_ratio, rel=1e-3)
    lengths = [sum(len(row.tokens) for row in share) for share in shares_of(found, 2, steps=1)[0]]
    assert metrics["global_seqlen/balanced_min"] == min(lengths)
    assert metrics["global_seqlen/balanced_max"] == max(lengths)
    assert metrics["global_seqlen/mean"] == np.mean(lengths)


@pytest.mark.parametrize("version", VERSIONS)
def test_counts_that_do_not_divide_cut_few_groups(version: str) -> None:
    rows = in_random_order(star_rows(16, 5, prompt=400, median=20))  # 10 rows of a step to each of 4 ranks
    metrics: dict[str, Any] = {}
    found = balanced(version, rows, metrics, trainer(version, 4, mini_batch=8, n=5))
    assert metrics["dta/groups_split"] == 0  # two groups of five

    rows = in_random_order(star_rows(12, 5, prompt=400, median=20))  # 15 rows to each of 2 ranks
    balanced(version, rows, metrics, trainer(version, 2, mini_batch=6, n=5))
    assert metrics["dta/groups_split"] == 0

    rows = in_random_order(star_rows(10, 6, prompt=400, median=20))  # 15 rows to each of 2 ranks, of six
    found = balanced(version, rows, metrics, trainer(version, 2, mini_batch=5, n=6))
    assert metrics["dta/groups_split"] == 2  # one per step
    places = places_of(shares_of(found, 2, steps=2))
    assert sorted(map(len, places.values())) == [1] * 8 + [2] * 2
    assert siblings_are_neighbours(shares_of(found, 2, steps=2))


@pytest.mark.parametrize("version", VERSIONS)
def test_same_batch_same_order(version: str) -> None:
    rows = in_random_order(star_rows(16, 4, prompt=6, median=40))
    orders = [balanced(version, rows, {}, trainer(version, 4, mini_batch=8, n=4)) for _ in range(2)]
    assert orders[0] == orders[1]


def test_tags_say_enough_where_every_session_has_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the plan from tags is the plan from tokens."""
    rows = in_random_order(star_rows(16, 4, prompt=6, median=40))
    queue = queue_with(rows, monkeypatch)
    found = balanced("v1", rows, metrics := {}, trainer("v1", 2, mini_batch=8, n=4))
    assert not queue.read
    monkeypatch.setattr(groups, "_rows_beyond_tags", lambda batch, numbers: list(range(len(numbers))))
    again = balanced("v1", rows, read := {}, trainer("v1", 2, mini_batch=8, n=4))
    assert len(queue.read) == len(rows)
    assert places_of(shares_of(again, 2, 2)) == places_of(shares_of(found, 2, 2)) and read == pytest.approx(metrics)


def test_several_rows_per_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of 4 to 12 rows with trees of several levels: tokens are read, padding fills up, few groups are cut."""
    rows = in_random_order([*turn_rows(14, sessions=4, turns=3), *star_rows(3, 4, prompt=50, median=20, seed=9)])
    rows = [Row("star" + row.uid, *row_fields(row)) if row.prompt_len == 50 else row for row in rows]
    queue = queue_with(rows, monkeypatch)
    metrics: dict[str, Any] = {}
    found = balanced("v1", rows, metrics, trainer("v1", 2, mini_batch=16, n=4))
    real = [row for row in found if row is not None]
    assert len(found) == 128 and len(queue.put) == 128 - len(rows)
    assert sorted(row.key for row in real) == sorted(row.key for row in rows)
    beyond_tags = {row.uid for row in rows if row.index}
    template = 1
    assert len(queue.read) - template == sum(row.uid in beyond_tags for row in rows) < len(rows)
    shares = shares_of(found, 2, steps=2)
    split = sum(len(place) > 1 for place in places_of(shares).values())
    assert split == metrics["dta/groups_split"] <= 3 and metrics["dta/groups"] == 17
    assert siblings_are_neighbours(shares)
    built = [PrefixTree.from_sequences([row.tokens for row in share if row]) for step in shares for share in step]
    flat, tree = sum(one.flat_tokens for one in built), sum(one.tree_tokens for one in built)
    assert metrics["dta/token_reduction_of_shares"] == pytest.approx(flat / tree, rel=1e-6)
    assert flat / tree > 0.95 * metrics["dta/token_reduction_ideal"]


def row_fields(row: Row) -> tuple[int, int, int, np.ndarray]:
    return row.session, row.index, row.prompt_len, row.tokens


def test_padding_fills_the_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = in_random_order(star_rows(13, 4, prompt=60, median=10))
    queue = queue_with(rows, monkeypatch)
    metrics: dict[str, Any] = {}
    found = balanced("v1", rows, metrics, trainer("v1", 4, mini_batch=8, n=4))
    assert len(found) == 64 and found.count(None) == len(queue.put) == 12
    assert metrics["dta/groups"] == 13 and metrics["dta/groups_split"] == 0
    tree = PrefixTree.from_sequences([row.tokens for row in rows])
    assert metrics["dta/token_reduction_ideal"] == pytest.approx(tree.compression_ratio, rel=1e-3)


def test_padding_is_dealt_out_to_all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions of several rows fill two mini-batches and a little of the third: each gets as much to learn from."""
    rows = in_random_order(star_rows(17, 4, prompt=60, median=10))  # 68 real rows, 28 of padding
    queue_with(rows, monkeypatch)
    metrics: dict[str, Any] = {}
    found = balanced("v1", rows, metrics, trainer("v1", 2, mini_batch=8, n=4))
    assert found.count(None) == 28 and metrics["dta/groups_split"] == 0
    real = [sum(row is not None for share in step for row in share) for step in shares_of(found, 2, steps=3)]
    assert sorted(real) == [20, 24, 24]


@pytest.mark.parametrize("version", VERSIONS)
def test_mini_batches_by_number(version: str, caplog: pytest.LogCaptureFixture) -> None:
    """48 rows in 3 mini-batches, which are none of the configured size; without their number it is one step, said."""
    rows = in_random_order(star_rows(12, 4, prompt=60, median=10))
    one = trainer(version, 2, mini_batch=5, n=4)
    one.config.trainer.critic_warmup = 5  # verl pads to whole mini-batches otherwise
    batch = kv_batch(rows) if version == "v1" else data_proto(rows)
    getattr(batch, "extra_info" if version == "v1" else "meta_info")["num_mini_batch"] = 3
    with caplog.at_level(logging.INFO, "dta_plugin"):
        one._balance_batch(batch, metrics={})
        assert "optimizer steps: 3" in caplog.text and "one optimizer step" not in caplog.text
        balanced(version, rows, {}, one)
    assert "48 rows are not whole mini-batches of 20" in caplog.text


def test_critic_warmup_is_one_step() -> None:
    """verl then pads to a multiple of the ranks only."""
    rows = in_random_order(star_rows(6, 4, prompt=10, median=10))
    one = trainer("v1", 2, mini_batch=16, n=4)
    one.config.trainer.critic_warmup = 5
    places = places_of(shares_of(balanced("v1", rows, {}, one), 2, steps=1))
    assert all(len(place) == 1 for place in places.values())


def test_a_step_of_one_group() -> None:
    rows = in_random_order(star_rows(2, 8, prompt=10, median=10))
    metrics: dict[str, Any] = {}
    balanced("v1", rows, metrics, trainer("v1", 4, mini_batch=1, n=8))
    assert metrics["dta/groups_split"] == 2


@pytest.mark.parametrize("option", [{"use_dta": False}, {"regroup": "never"}])
@pytest.mark.parametrize("version", VERSIONS)
def test_switched_off_is_stock(version: str, option: dict[str, Any]) -> None:
    rows = in_random_order(star_rows(16, 4, prompt=6, median=40))
    found = balanced(version, rows, {}, trainer(version, 2, mini_batch=8, n=4, **option))
    one = trainer(version, 2, mini_batch=8, n=4)
    balance.uninstall()
    assert not hasattr(one._balance_batch, "_dta_stock")
    assert [row.key for row in balanced(version, rows, {}, one)] == [row.key for row in found]


@pytest.mark.parametrize("version", VERSIONS)
def test_installing_twice_wraps_once(version: str) -> None:
    kind = type(trainer(version, 2, mini_batch=8, n=4))
    wrapped = kind._balance_batch
    balance.install()
    assert kind._balance_batch is wrapped and not hasattr(wrapped._dta_stock, "_dta_stock")


def test_wrong_options_are_errors() -> None:
    rows = star_rows(4, 2, prompt=5, median=5)
    with pytest.raises(InvalidInputError, match="unknown_option"):
        balanced("v1", rows, {}, trainer("v1", 2, mini_batch=4, n=2, unknown_option=1))


def unusable() -> list[tuple[str, Any, str]]:
    rows = star_rows(4, 2, prompt=5, median=5)
    no_uid, no_tags, odd_key = data_proto(rows), kv_batch(rows), kv_batch(rows)
    del no_uid.non_tensor_batch["uid"]
    del no_tags.tags[3]["prompt_len"]
    odd_key.keys[2] = "nothing"
    return [("v0", no_uid, "no uid"), ("v1", no_tags, "prompt_len"), ("v1", odd_key, "nothing")]


@pytest.mark.parametrize("case", range(3))
def test_a_batch_whose_groups_cannot_be_told(case: int, caplog: pytest.LogCaptureFixture) -> None:
    version, batch, reason = unusable()[case]
    with pytest.raises(UnsupportedError, match=reason):
        trainer(version, 2, mini_batch=4, n=2)._balance_batch(batch, metrics={})
    one = trainer(version, 2, mini_batch=4, n=2, on_unsupported="dense")
    with caplog.at_level(logging.INFO, "dta_plugin"):
        for _ in range(2):
            metrics: dict[str, Any] = {}
            one._balance_batch(unusable()[case][1], metrics=metrics)
            assert "global_seqlen/balanced_max" in metrics and "dta/groups" not in metrics
    assert len(caplog.messages) == 1 and reason in caplog.messages[0]


@pytest.mark.parametrize("shuffle", [False, True])
def test_what_is_said_is_said_once(shuffle: bool, caplog: pytest.LogCaptureFixture) -> None:
    rows = in_random_order(star_rows(16, 4, prompt=60, median=40))
    one = trainer("v1", 2, mini_batch=8, n=4, shuffle=shuffle)
    with caplog.at_level(logging.INFO, "dta_plugin"):
        for _ in range(2):
            balanced("v1", rows, {}, one)
    first, *others = caplog.messages
    assert "64 rows of 16 groups; ranks: 2, optimizer steps: 2, groups split: 0" in first
    assert [("shuffle=True" in message) for message in others] == [True] * shuffle


def test_a_dense_critic_counts_what_it_runs() -> None:
    """Groups of long prompts cost the actor little and a dense critic much: ranks even out both."""
    short = [replace(row, uid=f"s{row.uid}") for row in star_rows(1, 8, prompt=10, median=30, seed=1)]
    rows = in_random_order(star_rows(1, 8, prompt=1000, median=20) + short, 0)
    spread = {}
    for strategy in (None, "fsdp", "megatron"):
        one = trainer("v0", 2, mini_batch=2, n=8)
        one.use_critic, one.config.critic = strategy is not None, {"strategy": strategy}
        order = balanced("v0", rows, {}, one)
        lengths = [sum(len(row.tokens) for row in rank if row) for rank in (order[:8], order[8:])]
        spread[strategy] = max(lengths) / min(lengths)
    assert 2 * spread["megatron"] < spread[None] == spread["fsdp"]
