"""Which releases are supported, which are newer than tested, and that this is said once."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from dta_plugin.adapters.releases import (
    MEGATRON_CORE,
    TORCH,
    TRANSFORMERS,
    TRL,
    VERL,
    Releases,
    say_if_untested,
    supported_release,
)
from dta_plugin.errors import UnsupportedError

ROOT = Path(__file__).parents[2]
REFUSED, SUPPORTED, UNTESTED = "refused", "supported", "untested"
TABLE = {
    TRL: {
        REFUSED: ("0.29.1", "2.0.0", "2.0.0rc1", "2.0.0.dev0", "2.1.3"),
        SUPPORTED: ("1.0.0", "1.8.0", "1.16.0", "1.16.3", "1.16.0.dev0"),
        UNTESTED: ("1.17.0", "1.17.0.dev0", "1.19.0", "1.99"),
    },
    VERL: {
        REFUSED: ("0.7.1", "0.10.0", "0.10.0.dev0", "0.10.0rc1", "0.10a1", "1.0"),
        SUPPORTED: ("0.8.0", "0.9.0", "0.9.1", "0.9.1.post1", "0.9.1+cu128"),
        UNTESTED: ("0.9.2", "0.9.2.dev0", "0.9.2rc1"),
    },
    TRANSFORMERS: {
        REFUSED: ("4.56.2",),
        SUPPORTED: ("4.57", "5.0.0rc1", "5.24.1"),
        UNTESTED: ("5.25.0.dev0", "6.0"),
    },
}
CASES = [(releases, v, kind) for releases, kinds in TABLE.items() for kind, found in kinds.items() for v in found]


@pytest.fixture(autouse=True)
def nothing_said() -> Iterator[None]:
    say_if_untested.cache_clear()
    yield
    say_if_untested.cache_clear()


@pytest.mark.parametrize(("releases", "version", "kind"), CASES, ids=[f"{r.name} {v}" for r, v, _ in CASES])
def test_every_version_is_of_one_kind(releases: Releases, version: str, kind: str) -> None:
    assert releases.supports(version) == (kind != REFUSED)
    if kind != REFUSED:
        assert releases.is_untested(version) == (kind == UNTESTED)


@pytest.mark.parametrize("releases", [TRL, VERL], ids=lambda releases: releases.name)
def test_refused_versions_raise(releases: Releases, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, versions in TABLE[releases].items():
        for version in versions:
            monkeypatch.setattr(metadata, "version", lambda _, version=version: version)
            if kind != REFUSED:
                assert supported_release(releases) == version
                continue
            with pytest.raises(UnsupportedError, match=re.escape(f"{releases.name} {version} is installed")):
                supported_release(releases)


def test_newer_than_tested_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(metadata, "version", {"trl": "1.19.0", "transformers": "5.30.1"}.__getitem__)
    for _ in range(3):
        say_if_untested(TRL, TRANSFORMERS)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    found, tested = "TRL 1.19.0, transformers 5.30.1", "TRL 1.16, transformers 5.24"
    assert f"{found}, newer than what was tested, up to {tested}" in record.message


def test_only_what_is_newer_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(metadata, "version", {"trl": "1.16.0", "transformers": "5.25.0"}.__getitem__)
    say_if_untested(TRL, TRANSFORMERS)
    assert len(caplog.messages) == 1 and "TRL" not in caplog.text


@pytest.mark.parametrize(("trl", "rank"), [("1.16.0", "0"), ("1.19.0", "1")])
def test_nothing_is_said(
    trl: str, rank: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of what has been tested; nor by other ranks than the first."""
    monkeypatch.setattr(metadata, "version", {"trl": trl, "transformers": "5.24.0"}.__getitem__)
    monkeypatch.setenv("RANK", rank)
    say_if_untested(TRL, TRANSFORMERS)
    assert not caplog.records


@pytest.mark.parametrize("releases", [TRL, VERL, TRANSFORMERS, TORCH, MEGATRON_CORE], ids=lambda r: r.name)
def test_the_package_declares_the_same(releases: Releases) -> None:
    """pip's bounds, and the releases that the suites run with."""
    (declared,) = set(re.findall(rf'"({releases.package}[<>=][^"]*)"', (ROOT / "pyproject.toml").read_text()))
    bounds = {bound.operator: Version(bound.version) for bound in Requirement(declared).specifier}
    below = {} if releases.below is None else {"<": Version(releases.below)}
    assert bounds == {">=": Version(releases.oldest), **below}
    pinned = re.findall(rf"^\w+ \?= {releases.package}==(\S+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert all(releases.supports(version) and not releases.is_untested(version) for version in pinned)
