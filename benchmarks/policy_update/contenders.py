"""The ways to run one policy update's forward and backward pass that the benchmark compares.

Each factory returns a `Step`: a function that runs the model, computes the loss and calls backward. All use the loss
of GRPO's first iteration, the mean over completion tokens of ``-ratio * advantage`` with
``ratio = exp(logp - logp.detach())``, and compute entropies without a gradient, as TRL does by default.

* `trl`: stock TRL, `GRPOTrainer._get_per_token_logps_and_entropies` itself on a model with TRL's fused LM head. On CPUs
  that head runs on every position, prompts included, and once more in the backward pass.
* `dense`: a dense path that wastes nothing, stricter than any that ships: TRL's padded batch, LM head on completions
  only, through this package's own log-prob function.
* `prefix_grouper`: PrefixGrouper 0.0.1.post1 with the same LM head. Its own adapter fails on CPUs, so it gets the
  attention function below.
* `tree`: dta-plugin as its TRL adapter calls it, building the tree included.
* `flex`: the same with attention by torch's FlexAttention, which on CPUs has no backward pass.

Models may be PEFT's.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right
from transformers import PreTrainedModel

from benchmarks.common.models import without_adapters
from benchmarks.common.workloads import Workload
from dta_plugin import TreeConfig
from dta_plugin.execution.auto import run_tree
from dta_plugin.execution.batch import prepare
from dta_plugin.models.introspection import lm_head
from dta_plugin.models.lm_head import edge_logprobs


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """loss: []. logprobs, entropies: [completion tokens of all sequences], in the workload's order; all detached."""

    loss: torch.Tensor
    logprobs: torch.Tensor
    entropies: torch.Tensor


Step = Callable[[], Outcome]


def tree(model: PreTrainedModel, work: Workload, backend: str = "auto") -> Step:
    config = TreeConfig(backend=backend)

    def step() -> Outcome:
        batch = prepare(model, work.sequences, work.prompt_lengths, config)
        result = run_tree(model, batch, config, return_entropy=True)
        assert result.entropies is not None
        logprobs, entropies = (
            torch.cat([row[prompt - 1 :] for row, prompt in zip(rows, work.prompt_lengths, strict=True)])
            for rows in (result.logprobs, result.entropies)
        )
        loss = _loss(logprobs, _per_token_advantages(work))
        loss.backward()
        return Outcome(loss.detach(), logprobs.detach(), entropies.detach())

    return step


def flex(model: PreTrainedModel, work: Workload) -> Step:
    return tree(model, work, backend="flex")


def trl(model: PreTrainedModel, work: Workload) -> Step:
    """`model` must have TRL's fused LM head; see `prepare_for_trl`."""
    from trl import GRPOTrainer

    trainer = SimpleNamespace(accelerator=SimpleNamespace(autocast=nullcontext, is_main_process=False))
    batches = _micro_batches(work)
    total = sum(work.completion_lengths)

    def step() -> Outcome:
        outcomes = []
        for input_ids, attention_mask, completion, advantages in batches:
            logps, entropies, _ = GRPOTrainer._get_per_token_logps_and_entropies(
                trainer, model, input_ids, attention_mask, completion.shape[1], compute_entropy=True
            )
            loss = -(torch.exp(logps - logps.detach()) * advantages[:, None] * completion).sum() / total
            loss.backward()
            outcomes.append(Outcome(loss.detach(), logps.detach()[completion], entropies.detach()[completion]))
        return _joined(outcomes)

    return step


def dense(model: PreTrainedModel, work: Workload) -> Step:
    batches = _micro_batches(work)
    total = sum(work.completion_lengths)

    def step() -> Outcome:
        outcomes = []
        for input_ids, attention_mask, completion, advantages in batches:
            hidden = (
                without_adapters(model)
                .base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
                .last_hidden_state
            )
            columns = completion.shape[1]
            logprobs, entropies = _score(
                model, hidden[:, -columns - 1 : -1][completion], input_ids[:, -columns:][completion]
            )
            per_token = advantages.repeat_interleave(completion.sum(dim=1))
            loss = -(torch.exp(logprobs - logprobs.detach()) * per_token).sum() / total
            loss.backward()
            outcomes.append(Outcome(loss.detach(), logprobs.detach(), entropies.detach()))
        return _joined(outcomes)

    return step


def prepare_for_trl(model: PreTrainedModel) -> None:
    """What GRPOTrainer.__init__ does to its model, at temperature 1."""
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(
        without_adapters(model), temperature=1.0, cast_lm_head_to_fp32=False, outputs=("log_probs", "entropy")
    )


def prefix_grouper(model: PreTrainedModel, work: Workload) -> Step:
    """`model` must use the attention of `prepare_for_prefix_grouper`; `work` must be one group."""
    from prefix_grouper import PrefixGrouper

    device = work.advantages.device
    prompt = work.sequences[0][None, : work.prompt_lengths[0]]
    completions = [s[p:] for s, p in zip(work.sequences, work.prompt_lengths, strict=True)]
    completion_ids = torch.nn.utils.rnn.pad_sequence(completions, batch_first=True)
    lengths = torch.tensor(work.completion_lengths, device=device)
    completion_mask = torch.arange(completion_ids.shape[1], device=device) < lengths[:, None]
    prompt_mask = torch.ones_like(prompt, dtype=torch.bool)
    placeholder = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)  # transformers passes a 4-D mask on as it is

    def step() -> Outcome:
        grouper = PrefixGrouper.from_ungrouped_masks(
            prompt_mask, completion_mask, len(completions), device=device, padding_mode="right"
        )
        input_ids = grouper.concat_input(prompt, prompt_mask, completion_ids, completion_mask)
        positions = [torch.arange(info.prefix_len, device=device) for info in grouper.group_info]
        for info in grouper.group_info:
            positions += [torch.arange(n, device=device) + info.prefix_len for n in info.suffix_lens]
        hidden = (
            without_adapters(model)
            .base_model(
                input_ids=input_ids,
                position_ids=torch.cat(positions)[None],
                attention_mask=placeholder,
                use_cache=False,
                prefix_grouper=grouper,
            )
            .last_hidden_state
        )
        _, _, suffix, mask = grouper.split_output(hidden, include_prefix_last=1)
        targets = grouper.convert_padding(completion_ids, completion_mask, padding_mode="right")
        logprobs, entropies = _score(model, suffix[:, :-1][mask[:, 1:]], targets[mask[:, 1:]])
        loss = _loss(logprobs, _per_token_advantages(work))
        loss.backward()
        return Outcome(loss.detach(), logprobs.detach(), entropies.detach())

    return step


def prepare_for_prefix_grouper(model: PreTrainedModel) -> None:
    """Register PrefixGrouper's attention, over the function it lets its user choose, and set it on the model."""
    from transformers import AttentionInterface

    AttentionInterface.register("prefix_grouper_any_device", _grouped_attention)
    without_adapters(model).set_attn_implementation("prefix_grouper_any_device")


def _grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    prefix_grouper: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    return prefix_grouper.forward(_grouper_attention, query, key, value, scaling, prefix_grouper), None


def _grouper_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys_valid: torch.Tensor, scale: float, grouper: Any
) -> torch.Tensor:
    """Called for the prefixes (as many queries as keys) and for the suffixes (prefix keys first, then their own).

    q: [B, Hq, nq, D]. k, v: [B, Hkv, nk, D]. keys_valid: bool [B, nk]. -> [B, nq, Hq, D].
    """
    nq, nk = q.shape[2], k.shape[2]
    if nq == nk and bool(keys_valid.all()):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        return out.transpose(1, 2)
    if q.is_cuda and bool(keys_valid.all()):
        lower_right = causal_lower_right(nq, nk)  # FlashAttention, where a mask would mean one of the slow kernels
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=lower_right, scale=scale, enable_gqa=True)
        return out.transpose(1, 2)
    bias = grouper.__dict__.setdefault("_benchmark_bias", {}).get((nq, nk))  # once per batch, for all layers
    if bias is None:
        keys = torch.arange(nk, device=q.device)
        visible = keys <= torch.arange(nk - nq, nk, device=q.device)[:, None]
        visible = visible[None] if bool(keys_valid.all()) else visible & keys_valid[:, None, :]
        bias = torch.zeros(visible.shape, dtype=q.dtype, device=q.device).masked_fill_(~visible, float("-inf"))[:, None]
        grouper._benchmark_bias[nq, nk] = bias
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale, enable_gqa=True).transpose(1, 2)


def _loss(logprobs: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    return -(torch.exp(logprobs - logprobs.detach()) * advantages).mean()


def _per_token_advantages(work: Workload) -> torch.Tensor:
    counts = torch.tensor(work.completion_lengths, device=work.advantages.device)
    return work.advantages.repeat_interleave(counts)


def _score(model: PreTrainedModel, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden: [R, d], targets: int64 [R] -> log-probs and entropies [R]."""
    rows = torch.arange(len(targets), device=targets.device)
    logprobs, entropies = edge_logprobs(hidden, lm_head(without_adapters(model)), targets, rows, return_entropy=True)
    assert entropies is not None
    return logprobs, entropies


def _joined(outcomes: list[Outcome]) -> Outcome:
    """The sum of the micro-batches' losses, and all their tokens."""
    loss = torch.stack([outcome.loss for outcome in outcomes]).sum()
    return Outcome(loss, torch.cat([o.logprobs for o in outcomes]), torch.cat([o.entropies for o in outcomes]))


def _micro_batches(work: Workload) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
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
