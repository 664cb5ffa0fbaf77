"""Packed execution: the whole forest is one row of T tokens, one model call forward and one backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from dta_plugin.attention import TreeMask
from dta_plugin.attention.api import resolve_backend
from dta_plugin.attention.hf import install
from dta_plugin.errors import InvalidInputError, UnsupportedModelError
from dta_plugin.execution.model import causal_lm, lm_head, tree_forward
from dta_plugin.logprobs import LMHead, edge_logprobs
from dta_plugin.tree.layout import ScoredEdges, TreeLayout
from dta_plugin.tree.trie import PrefixTree


@dataclass(frozen=True, slots=True, eq=False)
class EdgeOutputs:
    """Per scored edge E: log-prob and entropy of the distribution it was drawn from; router loss of MoE models."""

    logprobs: torch.Tensor  # [E]
    entropies: torch.Tensor | None  # [E]
    router_loss: torch.Tensor | None  # []


def model_inputs(layout: TreeLayout, mask: TreeMask) -> dict[str, Any]:
    """Keyword arguments of the model's forward for one packed tree.

    The 4-D attention mask is a placeholder: transformers hands such a mask on as it is, where without one it would
    take position restarts for packed sequences and build a mask that is wrong for trees. Our attention ignores it.
    """
    return {
        "input_ids": layout.input_ids[None],
        "position_ids": layout.depth[None],
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=layout.input_ids.device),
        "use_cache": False,
        "dta_tree": mask,
    }


def run_packed(
    model: nn.Module,
    tree: PrefixTree,
    edges: ScoredEdges,
    *,
    backend: str = "auto",
    temperature: float = 1.0,
    return_entropy: bool = False,
    return_router_loss: bool = False,
    head_dtype: torch.dtype | None = None,
) -> EdgeOutputs:
    """Log-probs of the scored edges, differentiable in all parameters of `model` (wrapped or not).

    head_dtype: dtype of the LM-head projection, None for the model's own. The router loss is the MoE load-balancing
    loss of the flat batch, exactly: every token counts with its multiplicity.

    Raises UnsupportedModelError if an attention layer did not use the tree, InvalidInputError for NaN log-probs.
    """
    base = causal_lm(model)
    install(base)
    device = edges.target.device
    layout = TreeLayout.from_tree(tree, device)
    mask = TreeMask.from_layout(layout, resolve_backend(backend, device))
    head = lm_head(base, head_dtype)

    def forward(self: PreTrainedModel, **inputs: Any) -> dict[str, torch.Tensor]:
        backbone = getattr(self, self.base_model_prefix)
        inputs = {name: value for name, value in inputs.items() if value is not None}
        if return_router_loss:
            inputs["output_router_logits"] = True
        output = backbone(**inputs)
        logprobs, entropies = _score(output.last_hidden_state[0], layout, edges, head, temperature, return_entropy)
        result = {"logprobs": logprobs}
        if entropies is not None:
            result["entropies"] = entropies
        if return_router_loss:
            result["router_loss"] = _router_loss(self, output.router_logits, layout.multiplicity)
        return result

    with tree_forward(base, forward):
        result = model(**model_inputs(layout, mask))
    _check_every_layer_hit(base, mask)
    _check_finite(result["logprobs"], base)
    return EdgeOutputs(result["logprobs"], result.get("entropies"), result.get("router_loss"))


def _score(
    hidden: torch.Tensor,
    layout: TreeLayout,
    edges: ScoredEdges,
    head: LMHead,
    temperature: float,
    return_entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Edge log-probs [E] and edge entropies [E]."""
    rows = hidden.index_select(0, edges.rows)
    targets = layout.input_ids[edges.target]
    logprobs, entropies = edge_logprobs(rows, head, targets, edges.row_of_edge, temperature, return_entropy)
    return logprobs, None if entropies is None else entropies[edges.row_of_edge]


def _router_loss(model: PreTrainedModel, router_logits: Any, multiplicity: torch.Tensor) -> Any:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    config = model.config.get_text_config()
    experts = getattr(config, "num_experts", None) or config.num_local_experts
    return load_balancing_loss_func(router_logits, experts, config.num_experts_per_tok, multiplicity[None])


def _check_every_layer_hit(model: PreTrainedModel, mask: TreeMask) -> None:
    layers = model.config.get_text_config().num_hidden_layers
    missed = sorted(set(range(layers)) - mask.layers_seen)
    if missed:
        raise UnsupportedModelError(
            f"Attention layer(s) {missed} of {type(model).__name__} did not use the tree: something replaced their "
            "attention function. Expected every layer to call transformers' AttentionInterface; switch off whatever "
            "patches attention (custom kernels, other plugins), or use on_unsupported='dense'."
        )


def _check_finite(logprobs: torch.Tensor, model: nn.Module) -> None:
    if not bool(torch.isfinite(logprobs).all()):
        bad = int((~torch.isfinite(logprobs)).sum())
        raise InvalidInputError(
            f"{type(model).__name__} gave {bad} NaN or infinite log-probs of {logprobs.numel()}. Expected finite "
            "values; check the weights (a diverged run?), the learning rate and the dtype."
        )
