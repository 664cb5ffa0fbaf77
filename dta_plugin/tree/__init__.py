"""What is shared: sequences -> prefix tree -> depth-first layout -> report. Needs numpy and torch only."""

from dta_plugin.tree.layout import ScoredEdges, TreeLayout
from dta_plugin.tree.report import TreeReport
from dta_plugin.tree.trie import PrefixTree

__all__ = ["PrefixTree", "ScoredEdges", "TreeLayout", "TreeReport"]
