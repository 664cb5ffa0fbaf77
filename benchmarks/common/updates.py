"""One policy update's forward and backward pass, as the plugin runs it and as a dense path that wastes nothing.

Each factory returns a `Step`: a function that runs the model, computes the loss and calls backward. All use the loss
of GRPO's first iteration, the mean over completion tokens of ``-ratio * advantage`` with
``ratio = exp(logp - logp.detach())``, and compute entropies without a gradient, as TRL does by default. Models may be
PEFT's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from benchmarks.common.models import without_adapters
from benchmarks.common.workloads import Workload
from dta_plugin import TreeConfig
from dta_plugin.execution.auto import run_tree
from dta_plugin.execution.prepared_batch import prepare_batch
from dta_plugin.models.introspection import lm_head
from dta_plugin.models.lm_head import edge_logprobs


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """loss: []. logprobs, entropies: [completion tokens of all sequences], in the workload's order; all detached."""

    loss: torch.Tensor
    logprobs: torch.Tensor
    entropies: torch.Tensor


Step = Callable[[], Outcome]


def tree(
    model: PreTrainedModel,
    work: Workload,
    backend: str = "auto",
    images: Sequence[Mapping[str, torch.Tensor]] | None = None,
) -> Step:
    """images: per sequence, what the model's processor returns for them."""
    config = TreeConfig(backend=backend)

    def step() -> Outcome:
        batch = prepare_batch(model, work.sequences, work.prompt_lengths, config, images=images)
        result = run_tree(model, batch, config, return_entropy=True)
        assert result.entropies is not None
        logprobs, entropies = (
            torch.cat([row[prompt - 1 :] for row, prompt in zip(rows, work.prompt_lengths, strict=True)])
            for rows in (result.logprobs, result.entropies)
        )
        loss = policy_loss(logprobs, per_token_advantages(work))
        loss.backward()
        return Outcome(loss.detach(), logprobs.detach(), entropies.detach())

    return step


def dense(model: PreTrainedModel, work: Workload, inputs: Mapping[str, torch.Tensor] | None = None) -> Step:
    """inputs: of images, where all is one micro-batch."""
    batches = micro_batches(work)
    total = sum(work.completion_lengths)

    def step() -> Outcome:
        outcomes = []
        for input_ids, attention_mask, completion, advantages in batches:
            hidden = (
                without_adapters(model)
                .base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **(inputs or {}))
                .last_hidden_state
            )
            columns = completion.shape[1]
            logprobs, entropies = score(
                model, hidden[:, -columns - 1 : -1][completion], input_ids[:, -columns:][completion]
            )
            per_token = advantages.repeat_interleave(completion.sum(dim=1))
            loss = -(torch.exp(logprobs - logprobs.detach()) * per_token).sum() / total
            loss.backward()
            outcomes.append(Outcome(loss.detach(), logprobs.detach(), entropies.detach()))
        return joined(outcomes)

    return step


def policy_loss(logprobs: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    return -(torch.exp(logprobs - logprobs.detach()) * advantages).mean()


def per_token_advantages(work: Workload) -> torch.Tensor:
    counts = torch.tensor(work.completion_lengths, device=work.advantages.device)
    return work.advantages.repeat_interleave(counts)


def score(model: PreTrainedModel, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden: [R, d], targets: int64 [R] -> log-probs and entropies [R]."""
    rows = torch.arange(len(targets), device=targets.device)
    logprobs, entropies = edge_logprobs(hidden, lm_head(without_adapters(model)), targets, rows, return_entropy=True)
    assert entropies is not None
    return logprobs, entropies


def joined(outcomes: list[Outcome]) -> Outcome:
    """The sum of the micro-batches' losses, and all their tokens."""
    loss = torch.stack([outcome.loss for outcome in outcomes]).sum()
    return Outcome(loss, torch.cat([o.logprobs for o in outcomes]), torch.cat([o.entropies for o in outcomes]))


def micro_batches(work: Workload) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    size = work.micro_batch or len(work.sequences)
    return [_padded(work, slice(start, start + size)) for start in range(0, len(work.sequences), size)]


def _padded(work: Workload, rows: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """TRL's batch: prompts padded left, completions right -> input ids and mask [B, P + C], completions [B, C]."""
    sequences, prompts = work.sequences[rows], work.prompt_lengths[rows]
    prompt, completion = max(prompts), max(work.completion_lengths[rows])
    input_ids = sequences[0].new_zeros(len(sequences), prompt + completion)
    mask = torch.zeros_like(input_ids)
    for row, (sequence, length) in enumerate(zip(sequences, prompts, strict=True)):
        real = slice(prompt - length, prompt - length + len(sequence))
        input_ids[row, real], mask[row, real] = sequence, 1
    return input_ids, mask, mask[:, -completion:].bool(), work.advantages[rows]
