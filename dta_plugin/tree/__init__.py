"""What is shared: sequences -> prefix tree -> depth-first layout -> report. Needs numpy only, but for tensors torch."""

from typing import TYPE_CHECKING

from dta_plugin.tree.report import TreeReport
from dta_plugin.tree.trie import PrefixTree

if TYPE_CHECKING:
    from dta_plugin.tree.layout import ScoredEdges, TreeLayout

__all__ = ["PrefixTree", "ScoredEdges", "TreeLayout", "TreeReport"]


def __getattr__(name: str) -> object:
    """What holds tensors is loaded when it is asked for: counting needs no torch, which takes seconds to load."""
    if name not in __all__:
        raise AttributeError(f"module 'dta_plugin.tree' has no attribute {name!r}; it offers {', '.join(__all__)}")
    from dta_plugin.tree import layout

    return getattr(layout, name)
