"""TreeMask: the O(T) metadata that says which keys a query sees, and that travels to every layer.

It is passed as the keyword argument `dta_tree` of the model's forward: gradient checkpointing captures it there and
PEFT, DDP and FSDP forward it unchanged. It is a plain class because FSDP1 rebuilds dataclasses and dicts.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar
from weakref import WeakSet

import numpy as np
import torch

from dta_plugin.attention.blocks import BlockRule, Blocks
from dta_plugin.attention.function import OwnKeys, Place
from dta_plugin.recurrent.plan import StatePlan
from dta_plugin.recurrent.states import OwnStates, States
from dta_plugin.tree.layout import TreeLayout

HostArrays = tuple[np.ndarray, np.ndarray]


class TreeMask:
    """Tree-causal visibility of one packed row of T tokens.

    Key j is visible to query i iff ``j <= i < exit[j]`` and, in a layer with a sliding window,
    ``depth[i] - depth[j] < window``. Where blocks of tokens attend both ways it is ``j < reach[i] and i < exit[j]``,
    and each layer has a rule for them, see `ruled`.

    Args:
        exit: int64 [T] on the model's device, see `PrefixTree`.
        depth: int64 [T] alike.
        backend: who is to compute attention, a name from `config.BACKENDS`.
        host: the same exit and depth in the CPU's memory, as far as the caller has them.
        reach: int64 [T] on the model's device, see `PrefixTree`; None where all is causal.
        host_reach: the same in the CPU's memory, as far as the caller has it.
        rule: what every layer makes of blocks; None where each has a rule of its own, as for images.

    Attributes:
        calls: how often each attention layer has used this mask, by index, for the check that none was bypassed.
        backends_used: who computed it, and by which way recurrent layers ran.
        state_calls: how often each recurrent module has used it, by the module's `id`.
        rule: what the layer makes of blocks, see `BlockRule` in attention/blocks.py.
        layers_rule: whether layers have rules of their own for blocks.
        place: where the keys lie, see `Place` in attention/function.py.
        states: what comes in before the row and leaves it, see `States` in recurrent/states.py.
        alive: all masks there are; as long as one is, a layer may be recomputed with it.
    """

    alive: ClassVar[WeakSet[TreeMask]] = WeakSet()

    def __init__(
        self,
        exit: torch.Tensor,
        depth: torch.Tensor,
        backend: str = "auto",
        host: HostArrays | None = None,
        reach: torch.Tensor | None = None,
        host_reach: np.ndarray | None = None,
        rule: BlockRule | None = None,
    ) -> None:
        self.exit = exit
        self.depth = depth
        self.reach = reach
        self.rule: BlockRule = rule or "windowed"
        self.layers_rule = rule is None
        self.backend = backend
        self.calls: Counter[int] = Counter()
        self.state_calls: Counter[int] = Counter()
        self.backends_used: set[str] = set()
        self.place: Place = OwnKeys()
        self.states: States = OwnStates()
        self._plans: dict[object, Any] = {}
        self.alive.add(self)
        self._host = host
        self._host_reach = host_reach

    @classmethod
    def from_layout(cls, layout: TreeLayout, backend: str = "auto", rule: BlockRule | None = None) -> TreeMask:
        """The mask of a packed tree.

        Args:
            layout: the tree's T tokens on the model's device.
            backend: who is to compute attention, a name from `config.BACKENDS`.
            rule: what every layer makes of blocks; None where each has a rule of its own, as for images.

        Returns:
            A mask that no layer has used yet.
        """
        tree = layout.tree
        return cls(layout.exit, layout.depth, backend, (tree.exit, tree.depth), layout.reach, tree.reach, rule)

    def host(self) -> HostArrays:
        """exit and depth, int64 [T] each, where backends make their plans.

        A mask that was made of a device's tensors alone waits for a copy of them, once.
        """
        if self._host is None:
            self._host = self.exit.cpu().numpy(), self.depth.cpu().numpy()
        return self._host

    def blocks(self) -> Blocks | None:
        """The blocks that attend both ways, where backends make their plans; None if there are none."""
        if self.reach is None:
            return None
        if self._host_reach is None:
            self._host_reach = self.reach.cpu().numpy()
        return Blocks(self._host_reach, self.rule == "whole")

    def at_layer(self, index: int) -> TreeMask:
        """The mask as attention layer `index` has it."""
        return self

    def ruled(self, rule: BlockRule) -> TreeMask:
        """The same mask with another rule for blocks, and plans of its own; itself where there are no blocks."""
        if self.reach is None or rule == self.rule:
            return self
        mask = copy.copy(self)
        mask.rule = rule
        mask._plans = self.cached(("ruled", rule), dict)
        if rule == "causal":
            mask.reach = mask._host_reach = None
        return mask

    def state_plan(self) -> StatePlan:
        """How recurrent states run along the tree."""
        return self.cached("states", lambda: StatePlan.from_depth(self.host()[1]))

    def state_call_number(self, module: int) -> int:
        """Which of a recurrent module's calls in a pass the next one is."""
        return self.state_calls[module]

    @property
    def layers_seen(self) -> set[int]:
        """Indices of the attention layers that have used this mask."""
        return set(self.calls)

    def __len__(self) -> int:
        return self.exit.shape[0]

    def visible(self, window: int | None = None) -> torch.Tensor:
        """The mask written out: bool [T, T], True where query (row) sees key (column)."""
        index = torch.arange(len(self), device=self.exit.device)
        reach = index + 1 if self.reach is None else self.reach
        visible = (index[None, :] < reach[:, None]) & (index[:, None] < self.exit[None, :])
        if window is not None:
            near = self.depth[:, None] - self.depth[None, :] < window
            visible &= near | (reach[:, None] == reach[None, :]) if self.rule == "whole" else near
        return visible

    def cached(self, key: object, build: Callable[[], Any]) -> Any:
        """A backend's plan for this tree, built once and shared by all layers and passes."""
        if key not in self._plans:
            self._plans[key] = build()
        return self._plans[key]
