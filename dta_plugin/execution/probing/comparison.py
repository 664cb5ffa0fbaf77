"""The same sequences through a model's own path and as a tree, compared at every place where they could part.

- States: hidden states of the decoder, and log-probs, the model's own against the tree's, within what rounding
  explains (rounding_noise.py).
- Head: our reading of the head, on the hidden states of the model's own path, against the model's own logits.
- Scoring: log-probs of the tree against that head, plainly, on the hidden states of the tree.

Head and scoring have the same inputs on both sides, so that a few rounding steps are all that they may be off.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from dta_plugin.attention import TreeMask
from dta_plugin.dtypes import accumulation_dtype
from dta_plugin.execution.packed import check_every_layer_hit, model_inputs
from dta_plugin.execution.probing.forest import Forest
from dta_plugin.execution.probing.rounding_noise import (
    Gap,
    is_routed,
    logprob_floor,
    noise_seeds,
    perturbed_embeddings,
    rounding_unit,
)
from dta_plugin.execution.probing.traces import first_difference, in_layout_order, recorded, state_gaps, traced
from dta_plugin.execution.ranks import is_fsdp
from dta_plugin.models.dispatch import install
from dta_plugin.models.introspection import decoder_of, lm_head
from dta_plugin.models.vision.batch_images import BatchImages, TreeImages
from dta_plugin.models.vision.dense import dense_inputs
from dta_plugin.models.vision.forward import decoder_call, image_features
from dta_plugin.models.vision.support import text_model_of
from dta_plugin.tree.layout import ScoredEdges, TreeLayout
from dta_plugin.tree.trie import PrefixTree

# Tokens per chunk of a streamed forest, as a share of the tree: several chunks, stems and rebuilt paths.
_CHUNKS = 2
# Rows that show what rounding does.
_NOISY_ROWS = 3
# Rounding steps of float32 that the order of a sum explains.
_SUMS, _EPS = 64, torch.finfo(torch.float32).eps


class NotComparable(RuntimeError):
    """The model's own path gives nothing that a tree could be compared with."""


class Comparison:
    """A model's own path on some sequences, and what trees are compared with. Without gradient; in evaluation mode.

    worst: the largest gap so far, of log-probs in nats, or, of a model without a head, of hidden states, relative.
    """

    def __init__(
        self, model: nn.Module, base: PreTrainedModel, forest: Forest, backend: str, device: torch.device
    ) -> None:
        self.model, self.base, self.backend = model, base, backend
        self.rows = [torch.tensor(row, device=device) for row in forest.sequences]
        self.tree, self.images, self.more = _with_images(base, forest, self.rows)
        # Whose output both paths have: with images, a tree does not run the whole decoder.
        self.decoder = decoder_of(base) if forest.images is None else text_model_of(base)
        self.edges = ScoredEdges.from_tree(self.tree, None, device)
        self.paths = torch.from_numpy(self.tree.paths).to(device)
        self.routed, self.unit = is_routed(base), rounding_unit(base)
        self.step = self.unit + _SUMS * _EPS
        self.has_head = base.get_output_embeddings() is not None
        # The weight of a sharded head is whole within a call of the model only.
        self.head = None if is_fsdp(model) or not self.has_head else lm_head(base)
        self.head_difference: str | None = None
        self.worst = Gap(0.0, 0.0)
        self.logprobs, self.states = self._own(len(self.rows), looks_at_head=True)
        if not torch.isfinite(self.logprobs).all():
            raise NotComparable("the model gives random tokens log-probs that are not finite")
        noises = [self._noise(seed) for seed in noise_seeds(base, len(self.logprobs))]
        self.noise, self.state_noise = (Gap.largest(each) for each in zip(*noises, strict=True))

    def difference(self, executor: str) -> str | None:
        """Where a tree's results differ from the model's own ("from layer 3 on, by .."), or None.

        executor: "packed", "streamed", or "decoder" for a model without a head.
        """
        if self.head_difference is not None:
            return self.head_difference
        logprobs, states = self._tree(executor)
        state_gap = Gap.from_differences(state_gaps(states[self.paths], self.states), self.routed)
        gap = (
            Gap.from_differences(self.edges.per_token(logprobs) - self.logprobs, self.routed)
            if self.has_head
            else state_gap
        )
        self.worst = max(self.worst, gap, key=lambda each: each.most)
        if self.head is not None and (found := self._scoring(logprobs, states)) is not None:
            return found
        if not state_gap.is_within(self.state_noise, self.unit):
            explained = f"{state_gap.mean:.1e} on average, where rounding explains {self.state_noise.mean:.1e}"
            return f"{self._place(executor)}, hidden states by {explained}"
        if self.has_head and not gap.is_within(self.noise, logprob_floor(self.logprobs, self.unit)):
            explained = f"{gap.mean:.1e} nats on average, where rounding explains {self.noise.mean:.1e}"
            return f"in its head, log-probs by {explained}"
        return None

    def _noise(self, seed: int) -> tuple[Gap, Gap]:
        """Of log-probs and of hidden states."""
        with perturbed_embeddings(self.base, seed):
            logprobs, states = self._own(_NOISY_ROWS)
        gaps = logprobs - self.logprobs[: len(logprobs)], state_gaps(states, self.states[: len(states)])
        return Gap.from_differences(gaps[0], self.routed), Gap.from_differences(gaps[1], self.routed)

    def _place(self, executor: str) -> str:
        def run_own() -> None:
            for index in range(len(self.rows)):
                self._run(index)

        if is_fsdp(self.model):  # all ranks must call the model equally often
            return "in its decoder"
        layer = first_difference(self.base, self.tree.paths, run_own, lambda: self._traced(executor)[1])
        return "in its decoder" if layer is None else f"from layer {layer} on"

    def _own(self, count: int, looks_at_head: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the first rows: log-probs, flat, of tokens 1.. of each, and hidden states [tokens, H] of all."""
        rows = self.rows[:count]
        logprobs, states = [row.new_empty(0, dtype=torch.float32) for row in rows], []
        for index, row in enumerate(rows):
            logits, hidden = self._run(index)
            states.append(hidden)
            if logits is None:
                continue
            if looks_at_head and self.head is not None and self.head_difference is None:
                self.head_difference = self._head(logits, self.head.logits(hidden))
            logprobs[index] = logits[:-1].log_softmax(dim=-1).gather(1, row[1:, None])[:, 0]
        return torch.cat(logprobs), torch.cat(states)

    def _run(self, index: int) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The model's own logits [len, V], in float32 or wider, None if it has no head; hidden states [len, H]."""
        row = self.rows[index]
        if not self.has_head:
            return None, self._decoder(input_ids=row[None], **self.more[index], use_cache=False)
        with recorded([self.decoder]) as calls:
            logits: torch.Tensor = self.model(input_ids=row[None], **self.more[index], use_cache=False).logits[0]
        return logits.to(accumulation_dtype(logits.dtype)), calls[0][0]

    def _head(self, own: torch.Tensor, ours: torch.Tensor) -> str | None:
        """Both in [len, V], from the same hidden states."""
        if own.shape != ours.shape:
            return f"in its head: logits {tuple(own.shape)}, and {tuple(ours.shape)} as the tree reads it"
        finite = torch.isfinite(own) & torch.isfinite(ours)  # ids of no use may have -inf
        own, ours = own.masked_fill(~finite, 0.0), ours.masked_fill(~finite, 0.0)
        gap, size, largest = (own - ours).abs(), own.abs().mean().item(), own.abs().max().item()
        if gap.mean().item() <= self.step * size and gap.max().item() <= 4 * self.step * largest:
            return None
        return f"in its head, logits by {gap.mean().item():.1e} on average, from the same hidden states"

    def _scoring(self, logprobs: torch.Tensor, states: torch.Tensor) -> str | None:
        """The tree's log-probs [E] against the head on its own hidden states [T, H]."""
        assert self.head is not None
        rows, targets = self.edges.row_of_edge, self.edges.host.target
        logits = self.head.logits(states[self.edges.rows])
        tokens = torch.from_numpy(self.tree.tokens[targets]).to(logits.device)
        log_p = logits.log_softmax(dim=-1)
        expected = log_p[rows, tokens]
        size = logits[rows, tokens].abs() + (log_p.exp() * logits.abs()).nan_to_num(0.0).sum(dim=-1)[rows]
        gap, allowed = (logprobs - expected).abs(), self.unit * size + _SUMS * _EPS * (size - expected)
        if bool((gap <= allowed).all()):
            return None
        return f"in its head, log-probs by up to {gap.max().item():.1e} nats, from the same hidden states"

    def _tree(self, executor: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs [E] and hidden states [T, H]."""
        if executor == "decoder":
            install(self.base)
            layout = TreeLayout.from_tree(self.tree, self.paths.device)
            mask = TreeMask.from_layout(layout, self.backend)
            states = self._along(model_inputs(layout, mask))
            check_every_layer_hit(self.base, mask)
            return states.new_empty(0), states
        with recorded([self.decoder]) as calls:
            logprobs, order = self._traced(executor)
        return logprobs, in_layout_order(calls[0], order)

    def _traced(self, executor: str) -> tuple[torch.Tensor, np.ndarray]:
        """Log-probs [E], and the layout indices [T] in the order in which the model was given the tokens."""
        if executor == "decoder":
            return self._tree(executor)[0], np.arange(self.tree.tree_tokens)
        budget = max(1, self.tree.tree_tokens // _CHUNKS) if executor == "streamed" else None
        return traced(self.model, self.tree, self.edges, budget, self.backend, self.images)

    def _along(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Hidden states [T, H] of the tree, for a model without a head."""
        if self.images is None:
            return self._decoder(**inputs)
        features = image_features(self.base, self.images.units, self.paths.device)
        states: torch.Tensor = decoder_call(self.base, inputs, self.images, features).last_hidden_state[0]
        return states

    def _decoder(self, **inputs: Any) -> torch.Tensor:
        """Hidden states [tokens, H]. Past the decoder's hooks, which belong to its caller's own call."""
        states: torch.Tensor = self.base.forward(**inputs).last_hidden_state[0]
        return states


def _with_images(
    base: PreTrainedModel, forest: Forest, rows: list[torch.Tensor]
) -> tuple[PrefixTree, TreeImages | None, list[dict[str, torch.Tensor]]]:
    """The forest's tree and its images; per row, what the model's own forward is to get beside its ids."""
    if forest.images is None:
        return PrefixTree.from_sequences(forest.sequences), None, [{} for _ in rows]
    images = BatchImages.from_rows(base, forest.sequences, forest.images)
    return *images.merged(), dense_inputs(base, rows, forest.images)
