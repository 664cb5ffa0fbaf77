"""Actions that wait for a module: they run once it has been executed, whoever looked it up before, and from where."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest

from dta_plugin.adapters.imports import when_imported

NAME = "dta_waited_for"


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / f"{NAME}.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield
    sys.modules.pop(NAME, None)


class _Asking(MetaPathFinder):
    """A hook that asks all finders, as wrapt's and OpenTelemetry's do, with a guard against itself only."""

    def __init__(self) -> None:
        self.asks = True
        self.found: list[ModuleSpec | None] = []

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != NAME or not self.asks:
            return None
        self.asks = False
        try:
            self.found.append(importlib.util.find_spec(fullname))
        finally:
            self.asks = True
        return self.found[-1]


def test_actions_wait_for_their_module() -> None:
    seen: list[int] = []
    when_imported(NAME, lambda module: seen.append(module.value))
    when_imported(NAME, lambda module: seen.append(module.value + 1))
    assert seen == []
    module = importlib.import_module(NAME)
    assert seen == [1, 2]
    assert type(module.__loader__).__name__ == "SourceFileLoader"
    when_imported(NAME, lambda module: seen.append(3))
    assert seen == [1, 2, 3]


@pytest.mark.parametrize("first", [True, False])
def test_another_hook_that_asks_all_finders(first: bool) -> None:
    """It sits in front of ours, or behind it, where it asks ours again while ours asks it."""
    seen: list[int] = []
    when_imported(NAME, lambda module: seen.append(module.value))
    hook = _Asking()
    sys.meta_path.insert(0 if first else 1, hook)
    importlib.import_module(NAME)
    assert seen == [1]
    assert hook.found


def test_looking_a_module_up_is_no_import() -> None:
    """`find_spec` as a question whether something is installed, and what `python -m` reads of a loader."""
    seen: list[int] = []
    when_imported(NAME, lambda module: seen.append(module.value))
    for _ in range(2):
        spec = importlib.util.find_spec(NAME)
        assert spec is not None and spec.loader is not None
        assert spec.loader.get_code(NAME) is not None  # type: ignore[attr-defined]
    assert seen == []
    importlib.import_module(NAME)
    assert seen == [1]


def test_a_module_that_fails_first(tmp_path: Path) -> None:
    seen: list[int] = []
    when_imported(NAME, lambda module: seen.append(module.value))
    (tmp_path / f"{NAME}.py").write_text("raise RuntimeError('not yet')\n")
    with pytest.raises(RuntimeError, match="not yet"):
        importlib.import_module(NAME)
    (tmp_path / f"{NAME}.py").write_text("value = 2  # and no longer an error\n")
    importlib.import_module(NAME)
    assert seen == [2]


def test_threads(tmp_path: Path) -> None:
    """Half of them register while the other half import: every action runs, once."""
    (tmp_path / f"{NAME}.py").write_text("import time\ntime.sleep(0.05)\nvalue = 1\n")
    seen: list[int] = []
    errors: list[BaseException] = []
    when_imported(NAME, lambda module: seen.append(-1))
    start = threading.Barrier(16)

    def run(number: int) -> None:
        start.wait()
        try:
            if number % 2:
                importlib.import_module(NAME)
            else:
                threading.Event().wait(0.01 * number)
                when_imported(NAME, lambda module: seen.append(number))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert sorted(seen) == [-1, *range(0, 16, 2)]
