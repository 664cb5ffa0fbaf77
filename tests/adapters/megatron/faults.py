"""What could be wrong with a tree in Megatron's model, each of which has to show."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dta_plugin.adapters.verl_plugin.megatron.row import TreeRow
from dta_plugin.attention import TreeMask

Fault = Callable[[pytest.MonkeyPatch], None]


def rotary_by_index(monkeypatch: pytest.MonkeyPatch) -> None:
    own = TreeRow.from_rows.__func__  # type: ignore[attr-defined]

    def by_index(cls: type, *args: object) -> TreeRow:
        row = own(cls, *args)
        row.params.depth = torch.arange(len(row.params.depth))
        row.params.max_seqlen_q = row.params.max_seqlen_kv = len(row.params.depth)
        return row

    monkeypatch.setattr(TreeRow, "from_rows", classmethod(by_index))


def siblings_see_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    own = TreeMask.__init__

    def everything_visible(self: TreeMask, exit: torch.Tensor, depth: torch.Tensor, backend: str, host: tuple) -> None:
        exit.fill_(len(exit))
        host[0].fill(len(exit))
        own(self, exit, depth, backend, host)

    monkeypatch.setattr(TreeMask, "__init__", everything_visible)


FAULTS: dict[str, Fault] = {"rotary by index": rotary_by_index, "siblings visible": siblings_see_each_other}
