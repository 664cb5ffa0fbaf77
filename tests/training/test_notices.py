"""The first report: said once, by one process, and its tree drawn to a file that is asked for."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from dta_plugin.training.notices import Notices
from dta_plugin.tree import PrefixTree, TreeReport
from dta_plugin.tree.cost import CostEstimate
from tests.support.trees import Sequences, run, star


def report_of(sequences: Sequences, pruned: int = 0) -> TreeReport:
    return TreeReport(
        tree=PrefixTree.from_sequences(sequences),
        chunks=1,
        executor="packed",
        backend="cpu",
        reason="50% of dense FLOPs saved",
        cost=CostEstimate(2.0, 1.0),
        pruned_tokens=pruned,
    )


REPORT = report_of(star(4, prefix=20))


@pytest.fixture(autouse=True)
def loud(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.INFO, "dta_plugin"):
        yield


def test_said_and_drawn_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Folders are made, an existing file is overwritten, and later trees leave it as it is."""
    file, notices = tmp_path / "some" / "folder" / "tree.svg", Notices()
    notices.say_report(REPORT, str(file))
    assert caplog.messages == [f"dta: {REPORT}", f"dta: the first tree is drawn in {file}"]
    drawn = file.read_text()
    assert "first tree: 4 sequences, " in drawn and ElementTree.fromstring(drawn).tag.endswith("svg")
    notices.say_report(report_of(star(9)), str(file))
    assert len(caplog.messages) == 2 and file.read_text() == drawn
    Notices().say_report(report_of(star(9), pruned=1234), str(file))
    assert "first tree (1,234 tokens pruned): 9 sequences, " in file.read_text()


def test_nothing_asked_for_draws_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Notices().say_report(REPORT)
    assert not [*tmp_path.rglob("*.svg")]


def test_a_name_alone_is_said_in_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name, file in (("tree.svg", tmp_path / "tree.svg"), ("~/tree.svg", tmp_path / "home" / "tree.svg")):
        Notices().say_report(REPORT, name)
        assert caplog.messages[-1].endswith(f" is drawn in {file}") and file.exists()


def test_other_processes_are_silent_and_write_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Notices(speaks=False).say_report(REPORT, str(tmp_path / "tree.svg"))
    assert not caplog.messages and not [*tmp_path.rglob("*.svg")]


def test_a_batch_that_no_loss_reads_is_not_the_first_tree(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file, notices = tmp_path / "tree.svg", Notices()
    idle = report_of([[1], [2]], pruned=30)
    for _ in range(2):
        notices.say_report(idle, str(file))
    assert len(caplog.messages) == 1 and "no loss reads any of them" in caplog.text and not file.exists()
    notices.say_report(REPORT, str(file))
    assert "first tree: 4 sequences" in file.read_text() and len(caplog.messages) == 3


def test_rows_that_share_nothing_are_drawn_and_it_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "tree.svg"
    Notices().say_report(report_of([[1, *run(9)], [2, *run(9)]]), str(file))
    assert caplog.messages[-1] == f"dta: the first tree, in which nothing is shared, is drawn in {file}"
    assert "20 tokens, 20 computed (1.00x shared)" in file.read_text()


def test_a_file_that_cannot_be_written_is_loud_and_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder.svg").mkdir()
    for file in (tmp_path / "file" / "tree.svg", tmp_path / "folder.svg"):
        Notices().say_report(REPORT, str(file))
        level, said = caplog.record_tuples[-1][1:]
        assert level == logging.ERROR and f"the first tree is NOT drawn: {file} cannot be written (" in said


def test_whose_report_it_is(caplog: pytest.LogCaptureFixture) -> None:
    Notices().say_report(REPORT, whose="critic: ")
    assert caplog.messages == [f"dta: critic: {REPORT}"]
