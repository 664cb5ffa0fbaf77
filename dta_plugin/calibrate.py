"""Measure how fast a model trains as a tree and densely on this machine, and fit a `Calibration` to it.

A dozen batches that differ in what they ask for (tokens, attention, scored tokens, almost nothing) run forward and
backward, tree and dense in turn, several rounds; the fastest run counts. They are as large as the time allows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from dta_plugin.config import TreeConfig
from dta_plugin.errors import InvalidInputError
from dta_plugin.execution.auto import run_tree
from dta_plugin.execution.calibration_store import Calibration, describe
from dta_plugin.execution.prepared_batch import PreparedBatch, prepare_batch
from dta_plugin.models.introspection import input_device, model_cost
from dta_plugin.training.padding import side_by_side
from dta_plugin.tree.cost import Padded
from dta_plugin.tree.time_model import SecondsPerFlop, Work

_CONFIG = TreeConfig(calibration="off")
_ROUNDS = 3
_LEAST, _MOST = 256, 16384  # dense tokens of the largest batch


@dataclass(frozen=True, slots=True, eq=False)
class DenseBatch:
    """A dense micro-batch: prompts padded left, completions right.

    input_ids, attention_mask: int64 [B, P + C]. columns: C.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    columns: int

    @classmethod
    def from_case(cls, case: Case, device: torch.device) -> DenseBatch:
        ids, mask = side_by_side(case.sequences, case.first_scored, pad=0)
        return cls(ids.to(device), mask.to(device), ids.shape[1] - max(case.first_scored))

    @property
    def shape(self) -> Padded:
        rows, width = self.input_ids.shape
        return Padded(rows, width, self.columns, has_padding=not bool(self.attention_mask.all()))


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """A batch to measure. first_scored: per sequence, where its completion begins."""

    name: str
    sequences: list[np.ndarray]
    first_scored: list[int]


@dataclass(frozen=True, slots=True)
class Sample:
    """What a case took, forward and backward."""

    name: str
    tree_work: Work
    dense_work: Work
    tree_seconds: float
    dense_seconds: float


DensePath = Callable[[PreTrainedModel, DenseBatch], torch.Tensor]
"""Scores a dense micro-batch: -> log-probs [B, C] of its completions, differentiable."""


def padded_logprobs(model: PreTrainedModel, rows: DenseBatch) -> torch.Tensor:
    """Log-probs of completions as a plain trainer computes them: one padded call, LM head on the last columns."""
    output = model(
        input_ids=rows.input_ids,
        attention_mask=rows.attention_mask,
        logits_to_keep=rows.columns + 1,
        use_cache=False,
    )
    log_p = output.logits[:, :-1].float().log_softmax(dim=-1)
    return log_p.gather(2, rows.input_ids[:, -rows.columns :, None])[..., 0]


def calibrate(
    model: PreTrainedModel,
    *,
    seconds: float = 60.0,
    dense: DensePath = padded_logprobs,
    dense_path: str = "padded",
    return_entropy: bool = False,
    autocast: torch.dtype | None = None,
    batches: Callable[[int], Iterable[Case]] | None = None,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[str], None] = lambda line: None,
) -> tuple[Calibration, list[Sample]]:
    """Measure for about `seconds`, and fit a speed per part of the model to it. Gradients are None afterwards.

    Args:
        model: loaded, on its device, as it is trained (dtype, checkpointing, adapters); put into training mode.
        seconds: about how long to measure, at least 1.
        dense: the dense path to compare with: a model and rows, int64 [B, P + C] -> log-probs [B, C], differentiable.
        dense_path: what it is called in the result.
        return_entropy: the tree gives entropies too.
        autocast: dtype of torch.autocast around forward passes, as with a trainer's bf16=True; None: without.
        batches: what to time, four batches or more, given the dense tokens of the largest; None for random tokens.
        clock: seconds; process time suits one CPU thread on a machine that is busy otherwise.
        progress: gets a line per round.

    Returns:
        The calibration, which ``save()`` puts where training finds it, and what each measured batch took, in seconds.

    Raises:
        InvalidInputError: less than a second.
    """
    if not seconds >= 1:
        raise InvalidInputError(f"seconds={seconds}. Expected at least 1.")
    model.train()
    vocab, device_type = model.config.get_text_config().vocab_size, input_device(model).type
    forward = nullcontext if autocast is None else partial(torch.autocast, device_type, autocast)

    batches = batches or partial(cases, vocab)

    def benches_of(tokens: int) -> list[Bench]:
        return [Bench(model, case, dense, return_entropy, clock, forward) for case in batches(tokens)]

    tokens, benches = _LEAST, benches_of(_LEAST)
    _once(benches)
    while tokens < _MOST and 4 * _ROUNDS * _once(benches) <= seconds:  # twice the tokens take at most 4 times as long
        tokens *= 2
        benches = benches_of(tokens)
    for number in range(1, _ROUNDS + 1):
        taken = _once(benches)
        progress(f"round {number} of {_ROUNDS}, up to {tokens} dense tokens: {taken:.1f} s")
    found = [bench.sample() for bench in benches]
    tree, tree_error = _fitted([s.tree_work for s in found], [s.tree_seconds for s in found])
    flat, flat_error = _fitted([s.dense_work for s in found], [s.dense_seconds for s in found])
    with forward():
        about = describe(model)
    return Calibration(tree, flat, dense_path, max(tree_error, flat_error), about), found


def cases(vocab: int, tokens: int) -> Iterator[Case]:
    """Batches of at most about `tokens` dense tokens. vocab: token ids are below it."""
    generator = np.random.default_rng(0)

    def draw(share: float) -> np.ndarray:
        return generator.integers(vocab, size=max(2, round(tokens * share)))

    def star(name: str, prompt: float, completions: Sequence[float]) -> Case:
        shared = draw(prompt)
        return Case(name, [np.concatenate([shared, draw(c)]) for c in completions], [len(shared)] * len(completions))

    def single(name: str, share: float, scored: float) -> Case:
        sequence = draw(share)
        return Case(name, [sequence], [max(1, round(len(sequence) * (1 - scored)))])

    yield single("next to nothing", 0, 1.0)
    yield single("a short sequence", 1 / 32, 1.0)
    yield single("one sequence, all scored", 1 / 2, 1.0)
    yield single("one sequence, little scored", 1 / 2, 1 / 16)
    unrelated = [draw(1 / 16) for _ in range(16)]
    yield Case("unrelated, equal lengths", unrelated, [max(1, len(s) // 4) for s in unrelated])
    uneven = [draw((1 + i) / 64) for i in range(8)]
    yield Case("unrelated, uneven", uneven, [max(1, len(s) // 2) for s in uneven])
    yield star("2 completions of one prompt", 1 / 8, [3 / 8, 1 / 8])
    yield star("8 short completions", 1 / 10, [1 / 40, 1 / 80] * 4)
    yield star("8 long completions", 1 / 40, [1 / 10, 1 / 20] * 4)
    yield star("32 completions", 1 / 40, [1 / 160] * 32)
    conversation = [draw(1 / 32) for _ in range(7)]
    turns = [np.concatenate(conversation[: turn + 1]) for turn in range(1, 7)]
    yield Case("a conversation, turn by turn", turns, [len(t) - len(conversation[0]) for t in turns])


def _once(benches: Sequence[Bench]) -> float:
    """Seconds of one round."""
    return sum(sum(bench.run()) for bench in benches)


class Bench:
    """One case, run as a tree and densely as often as asked."""

    def __init__(
        self,
        model: PreTrainedModel,
        case: Case,
        dense: DensePath,
        return_entropy: bool,
        clock: Callable[[], float],
        forward: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.model, self.case, self.dense = model, case, dense
        self.return_entropy, self.clock, self.forward = return_entropy, clock, forward
        self.device = input_device(model)
        self.rows = DenseBatch.from_case(case, self.device)
        self.taken: list[tuple[float, float]] = []

    def run(self) -> tuple[float, float]:
        """Seconds of the tree and of the dense path."""
        self.taken.append((self._timed(self._tree), self._timed(self._dense)))
        return self.taken[-1]

    def sample(self) -> Sample:
        """The fastest run of each: what else the machine does only ever adds."""
        tree_seconds, dense_seconds = (min(times) for times in zip(*self.taken, strict=True))
        cost, batch = model_cost(self.model), self._prepared()
        tree_work = cost.work(batch.tree.tree_tokens, batch.tree.depth, len(batch.edges.rows))
        return Sample(self.case.name, tree_work, cost.padded_work(self.rows.shape), tree_seconds, dense_seconds)

    def _prepared(self) -> PreparedBatch:
        return prepare_batch(self.model, self.case.sequences, self.case.first_scored, _CONFIG)

    def _tree(self) -> None:
        with self.forward():
            result = run_tree(self.model, self._prepared(), _CONFIG, return_entropy=self.return_entropy)
        torch.cat(result.logprobs).sum().backward()

    def _dense(self) -> None:
        scored = self.rows.attention_mask[:, -self.rows.columns :].bool()
        with self.forward():
            logprobs = self.dense(self.model, self.rows)
        logprobs[scored].sum().backward()

    def _timed(self, step: Callable[[], None]) -> float:
        self.model.zero_grad(set_to_none=True)
        _wait_for(self.device)
        start = self.clock()
        step()
        _wait_for(self.device)
        seconds = self.clock() - start
        self.model.zero_grad(set_to_none=True)
        return seconds


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _fitted(work: list[Work], seconds: list[float]) -> tuple[SecondsPerFlop, float]:
    """(rates, largest relative error)."""
    rates = SecondsPerFlop.fit(work, seconds)
    return rates, max(abs(rates.seconds(w) / s - 1) for w, s in zip(work, seconds, strict=True))
