"""Our path with the recurrent layers of the package tree-recurrence (pip install --no-deps tree-recurrence).

It keeps its layers along TRL's tree rows, and attention is ours, so that both run the very same tree. Without FLA it
runs every root-to-leaf path as a row of one padded batch inside recurrent layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any
from unittest.mock import patch
from weakref import WeakSet

import numpy as np
import torch
from transformers import PreTrainedModel

from benchmarks.common.models import without_adapters
from benchmarks.common.updates import Outcome, Step, tree
from benchmarks.common.workloads import Workload
from dta_plugin.attention.mask import TreeMask
from dta_plugin.execution import packed
from dta_plugin.models import attention_keywords, recurrent_registry
from dta_plugin.tree.layout import TreeLayout


def tree_recurrence(model: PreTrainedModel, work: Workload) -> Step:
    """`model` must be one whose recurrent layers that package knows."""
    step = tree(model, work)

    def along_its_plan() -> Outcome:
        with _its_layers(without_adapters(model)):
            return step()

    return along_its_plan


@contextmanager
def _its_layers(model: PreTrainedModel) -> Iterator[None]:
    """Mixers get the tree as that package reads it, and ours are out of the way."""
    package = import_module("tree_recurrence")
    with patch.object(TreeMask, "alive", WeakSet()):  # no graph is needed any more
        recurrent_registry.uninstall()  # it looks at what transformers' functions are
    ours = packed.model_inputs

    def past_ours(self: Any, *args: Any, dta_tree: Any = None, **kwargs: Any) -> Any:
        return self.behind(*args, **kwargs)

    with ExitStack() as stack:
        for owner, name, value in (
            (packed, "model_inputs", lambda layout, mask: ours(layout, mask) | _segments(layout)),
            (packed, "check_every_layer_hit", lambda model, mask: None),
            (attention_keywords, "_KNOWN", attention_keywords._KNOWN | set(package.TREE_KWARGS)),
            (recurrent_registry, "install", lambda model: None),
            (recurrent_registry._Mixer, "__call__", past_ours),
        ):
            stack.enter_context(patch.object(owner, name, value))
        package.install(model)
        stack.callback(package.uninstall, model)
        yield


def _segments(layout: TreeLayout) -> dict[str, torch.Tensor]:
    """The nodes of the tree as that package calls them."""
    starts = layout.tree.node_start
    above = layout.tree.parent[starts[:-1]]
    parents = np.where(above < 0, -1, np.searchsorted(starts, above, side="right") - 1)
    return {"tree_cu_seqlens_q": torch.from_numpy(starts), "tree_segment_parents": torch.from_numpy(parents)}
