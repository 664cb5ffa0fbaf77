"""Optimizer steps that cover what verl can be set to; every engine that is tested takes them one after the other."""

from __future__ import annotations

from dta_plugin.config import TreeConfig
from tests.adapters.verl.support import Step

DYNAMIC = [Step(), Step(shape="turns")]
STATIC = [Step(dynamic=False), Step(shape="turns", dynamic=False, rows=3, remove_padding=False)]
TEMPERATURES = [Step(shape="turns", temperature=None), Step(temperature=1.0)]
# Sequences have up to 40 tokens: stock verl needs a budget of at least that.
SMALL_BUDGET = [Step(shape="turns", budget=30, stock_budget=90)]
STREAMED = [Step(shape="turns", budget=48, config=TreeConfig(executor="streamed", max_tree_tokens_per_chunk=20))]
STREAMED += [Step(temperature=None, config=TreeConfig(executor="streamed", max_tree_tokens_per_chunk=20))]

COMMON = DYNAMIC + STATIC + TEMPERATURES + SMALL_BUDGET
STEPS = {"fsdp": COMMON, "fsdp2": COMMON + STREAMED}
