"""One policy update on all tokens and on random subsets of them (NAT): what updates.py compares.

* `dense`: the lean dense path of common/updates.py, on all tokens.
* `tree`: dta-plugin on all tokens, likewise.
* `rpc`, `urs`: dta-plugin on what a selection draws, anew in every run: sequences end with their last kept token, the
  LM head runs where tokens are kept, weights 1 / p under the full loss's denominator. Drawing is part of their time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from benchmarks.common import updates
from benchmarks.common.workloads import Workload
from dta_plugin import PrefixTree, TreeConfig
from dta_plugin.execution.auto import run_tree
from dta_plugin.execution.prepared_batch import prepare_batch
from dta_plugin.token_selection.select import TokenSelection, draw
from dta_plugin.tree.layout import ScoredEdges


@dataclass(frozen=True, slots=True)
class Size:
    """What one update ran on.

    flat_tokens: of all sequences. tree_tokens: of their tree, None where they ran apart. scored_tokens: log-probs that
    the LM head computed, a shared one once. kept_fraction: share of the completion tokens that carry loss.
    """

    flat_tokens: int
    tree_tokens: int | None
    scored_tokens: int
    kept_fraction: float


Step = Callable[[], Size]


class Deviation:
    """How far gradients of drawings are from that of all tokens, which comes first."""

    def __init__(self, whole: dict[str, torch.Tensor]) -> None:
        self.whole, self.drawings, self.squares = whole, 0, 0.0
        self.sums = {name: torch.zeros_like(gradient, dtype=torch.float64) for name, gradient in whole.items()}

    def add(self, gradient: dict[str, torch.Tensor]) -> None:
        self.drawings += 1
        for name, own in gradient.items():
            self.sums[name] += own
            self.squares += float((own.double() - self.whole[name]).square().sum())

    def result(self) -> dict[str, float]:
        """Relative to the length of the whole gradient, in the 2-norm over all parameters."""
        length = math.sqrt(sum(float(g.double().square().sum()) for g in self.whole.values()))
        off = sum(float((self.sums[n] / self.drawings - g).square().sum()) for n, g in self.whole.items())
        one = math.sqrt(self.squares / self.drawings) / length
        mean = math.sqrt(off) / length
        return {"drawings": self.drawings, "one": one, "mean": mean, "expected": one / math.sqrt(self.drawings)}


def dense(model: PreTrainedModel, work: Workload) -> Step:
    step, flat = updates.dense(model, work), sum(map(len, work.sequences))
    return _sized(step, Size(flat, None, sum(work.completion_lengths), 1.0))


def tree(model: PreTrainedModel, work: Workload) -> Step:
    made = PrefixTree.from_sequences(work.sequences)
    edges = ScoredEdges.from_tree(made, work.prompt_lengths)
    return _sized(updates.tree(model, work), Size(made.flat_tokens, made.tree_tokens, len(edges.target), 1.0))


def on_subset(model: PreTrainedModel, work: Workload, selection: TokenSelection) -> Step:
    lengths = np.array(work.completion_lengths)
    carries_loss = np.arange(lengths.max()) < lengths[:, None]
    groups, config, drawings = _groups(work), TreeConfig(), itertools.count()

    def step() -> Size:
        drawn = draw(selection, carries_loss, groups, seed=0, step=next(drawings), rank=0)
        kept = [np.flatnonzero(row) for row in drawn.weights]
        sequences, scored = [], []
        for sequence, prompt, tokens in zip(work.sequences, work.prompt_lengths, kept, strict=True):
            sequences.append(sequence[: prompt + tokens[-1] + 1])
            scored.append(np.isin(np.arange(len(sequences[-1])), prompt + tokens))
        batch = prepare_batch(model, sequences, scored, config)
        result = run_tree(model, batch, config, return_entropy=True)
        logprobs = torch.cat(
            [
                row[prompt - 1 + tokens]
                for row, prompt, tokens in zip(result.logprobs, work.prompt_lengths, kept, strict=True)
            ]
        )
        per_row = torch.tensor([len(tokens) for tokens in kept], device=logprobs.device)
        weights = torch.from_numpy(drawn.weights[drawn.weights > 0]).to(logprobs)
        ratio = torch.exp(logprobs - logprobs.detach())
        loss = -(ratio * weights * work.advantages.repeat_interleave(per_row)).sum() / sum(work.completion_lengths)
        loss.backward()
        made = batch.tree
        share = drawn.statistics()["kept_fraction"]
        return Size(made.flat_tokens, made.tree_tokens, len(batch.edges.target), share)

    return step


def _sized(step: updates.Step, size: Size) -> Step:
    def sized() -> Size:
        step()
        return size

    return sized


def _groups(work: Workload) -> list[int]:
    """Per sequence a number, the same for those of one prompt."""
    prompts = [tuple(s[:p].tolist()) for s, p in zip(work.sequences, work.prompt_lengths, strict=True)]
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    return [numbers[prompt] for prompt in prompts]
