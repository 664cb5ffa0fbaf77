"""The ways to run one policy update that the benchmark compares, as common/updates.py says what a way is.

* `trl`: stock TRL, `GRPOTrainer._get_per_token_logps_and_entropies` itself on a model with TRL's fused LM head. On CPUs
  that head runs on every position, prompts included, and once more in the backward pass.
* `dense`: a dense path that wastes nothing, stricter than any that ships: TRL's padded batch, LM head on completions
  only, through this package's own log-prob function.
* `prefix_grouper`: PrefixGrouper 0.0.1.post1 with the same LM head. Its own adapter fails on CPUs, so it gets the
  attention function below.
* `tree`: dta-plugin as its TRL adapter calls it, building the tree included.
* `nodes`: the same with every recurrent layer's own forward node after node, the way of layers that are not known.
* `tree_recurrence`: the same with recurrent layers as peer.py has them, if that package is installed.
* `flex`: the same with attention by torch's FlexAttention, which on CPUs has no backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right
from transformers import PreTrainedModel

from benchmarks.common.models import without_adapters
from benchmarks.common.stock import prepare_for_trl, trl
from benchmarks.common.updates import Outcome, Step, dense, per_token_advantages, policy_loss, score, tree
from benchmarks.common.workloads import Workload
from benchmarks.policy_update import peer
from dta_plugin.models import recurrent_layers, recurrent_registry


def flex(model: PreTrainedModel, work: Workload) -> Step:
    return tree(model, work, backend="flex")


def nodes(model: PreTrainedModel, work: Workload) -> Step:
    step = tree(model, work)

    def node_after_node() -> Outcome:
        with patch.object(recurrent_registry, "way", lambda mixer: recurrent_layers.Nodes("cache")):
            return step()

    return node_after_node


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
        logprobs, entropies = score(model, suffix[:, :-1][mask[:, 1:]], targets[mask[:, 1:]])
        loss = policy_loss(logprobs, per_token_advantages(work))
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


CONTENDERS: dict[str, Callable[[PreTrainedModel, Workload], Step]] = {
    "trl": trl,
    "dense": dense,
    "prefix_grouper": prefix_grouper,
    "flex": flex,
    "nodes": nodes,
    "tree_recurrence": peer.tree_recurrence,
    "tree": tree,
}
PREPARE = {"trl": prepare_for_trl, "prefix_grouper": prepare_for_prefix_grouper}
