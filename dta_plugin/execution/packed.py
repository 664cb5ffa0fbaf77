"""Packed execution: the whole forest is one row of T tokens, in one call of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from dta_plugin.attention import TreeMask
from dta_plugin.errors import InvalidInputError, UnsupportedError
from dta_plugin.models.attention_registry import carry
from dta_plugin.models.dispatch import install
from dta_plugin.models.introspection import causal_lm, decoder_of, lm_head, tree_forward
from dta_plugin.models.layers import attention_modules, layer_types
from dta_plugin.models.lm_head import LMHead, edge_logprobs
from dta_plugin.models.recurrent_layers import layer_of, mixers
from dta_plugin.models.vision.batch_images import TreeImages
from dta_plugin.models.vision.forward import decoder_call, image_features
from dta_plugin.tree.layout import ScoredEdges, TreeLayout
from dta_plugin.tree.trie import PrefixTree


@dataclass(frozen=True, slots=True, eq=False)
class EdgeOutputs:
    """Per scored edge E: log-prob and entropy of the distribution it was drawn from; router loss of MoE models.

    backend: who computed attention.
    """

    logprobs: torch.Tensor  # [E]
    entropies: torch.Tensor | None  # [E]
    router_loss: torch.Tensor | None  # []
    backend: str


def model_inputs(layout: TreeLayout, mask: TreeMask) -> dict[str, Any]:
    """Keyword arguments of the model's forward for one packed tree, for calls inside `tree_attention_scope`.

    Args:
        layout: the tree's T tokens on the model's device.
        mask: who sees whom, and by which backend: ``TreeMask.from_layout(layout)``.

    Returns:
        input_ids and position_ids, int64 [1, T]; a placeholder attention_mask, bool [1, 1, 1, 1], that carries the
        tree; ``use_cache=False``; and the mask itself as ``dta_tree``.
    """
    return row_inputs(layout.input_ids, layout.depth, mask)


def row_inputs(input_ids: torch.Tensor, depth: torch.Tensor, mask: TreeMask) -> dict[str, Any]:
    """Keyword arguments of the model's forward for one packed row. input_ids, depth: int64 [T].

    The 4-D attention mask is a placeholder: transformers hands such a mask on as it is, where without one it would
    take position restarts for packed sequences and build a mask that is wrong for trees. It carries the tree to
    attention layers that hand on no keywords.
    """
    return {
        "input_ids": input_ids[None],
        "position_ids": depth[None],
        "attention_mask": carry(torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device), mask),
        "use_cache": False,
        "dta_tree": mask,
    }


def run_packed(
    model: nn.Module,
    tree: PrefixTree,
    edges: ScoredEdges,
    *,
    images: TreeImages | None = None,
    backend: str = "auto",
    temperature: float = 1.0,
    return_entropy: bool = False,
    return_router_loss: bool = False,
    head_dtype: torch.dtype | None = None,
    allow_nonfinite: bool = False,
) -> EdgeOutputs:
    """Log-probs of the scored edges, differentiable in all parameters of `model` (wrapped or not).

    head_dtype: dtype of the LM-head projection, None for the model's own. The router loss is the MoE load-balancing
    loss of the flat batch, exactly: every token counts with its multiplicity.

    Raises UnsupportedError if an attention layer did not use the tree, InvalidInputError for log-probs that are not
    finite, unless they are allowed.
    """
    base = causal_lm(model)
    install(base)
    head = lm_head(base, head_dtype)
    layout = TreeLayout.from_tree(tree, edges.target.device)
    mask = TreeMask.from_layout(layout, backend)
    own = temperature if edges.temperature is None else edges.temperature

    def forward(self: PreTrainedModel, dta_inputs: dict[str, Any], **_: Any) -> dict[str, torch.Tensor]:
        router = {"output_router_logits": True} if return_router_loss else {}
        if images is None:
            output = decoder_of(self)(**dta_inputs, **router)
        else:
            features = image_features(self, images.units, layout.input_ids.device)
            output = decoder_call(self, dta_inputs | router, images, features)
        rows = output.last_hidden_state[0].index_select(0, edges.rows)
        on_both = edges.row_of_edge, edges.host.row_of_edge
        logprobs, entropies = score(rows, head, layout.input_ids[edges.target], *on_both, own, return_entropy)
        result = {"logprobs": logprobs}
        if entropies is not None:
            result["entropies"] = entropies
        if return_router_loss:
            result["router_loss"] = _router_loss(self, output.router_logits, layout.multiplicity)
        return result

    with tree_forward(base, forward):
        result = model(dta_inputs=model_inputs(layout, mask))
    check_every_layer_hit(base, mask)
    if not allow_nonfinite:
        check_finite(result["logprobs"], base)
    return EdgeOutputs(
        logprobs=result["logprobs"],
        entropies=result.get("entropies"),
        router_loss=result.get("router_loss"),
        backend="+".join(sorted(mask.backends_used)),
    )


def score(
    rows: torch.Tensor,
    head: LMHead,
    targets: torch.Tensor,
    row_of_edge: torch.Tensor,
    host_row_of_edge: np.ndarray,
    temperature: float | torch.Tensor,
    return_entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Edge log-probs [E] and edge entropies [E] from the hidden states `rows` [R, H]; see `edge_logprobs`."""

    def run(_: nn.Module, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return edge_logprobs(rows, head, targets, row_of_edge, temperature, return_entropy, host_row_of_edge)

    if isinstance(head.module, FSDPModule) and head.is_plain:
        # The weight of a sharded head is whole only inside a call of it, and every rank must call it equally often.
        with tree_forward(head.module, run):
            logprobs, entropies = head.module(rows)
    else:
        logprobs, entropies = run(head.module, rows)
    return logprobs, None if entropies is None else entropies[row_of_edge]


def _router_loss(model: PreTrainedModel, router_logits: Any, multiplicity: torch.Tensor) -> Any:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    config = model.config.get_text_config()
    experts = getattr(config, "num_experts", None) or config.num_local_experts
    return load_balancing_loss_func(router_logits, experts, config.num_experts_per_tok, multiplicity[None])


def check_every_layer_hit(model: PreTrainedModel, mask: TreeMask) -> None:
    """Raises UnsupportedError where an attention or recurrent layer has not used the tree."""
    layers = set(range(model.config.get_text_config().num_hidden_layers))
    # Models that loop over their layers state more than they have.
    recurrent = mixers(model)
    known = {layer for layer in attention_modules(model) if layer in layers or layer < 0}  # shared ones count from -1
    attending = known or (set() if recurrent else layers)
    missed = sorted(layer for layer in attending if mask.calls[layer] < (1 if layer >= 0 else _shared_calls(model)))
    if missed:
        raise UnsupportedError(
            f"Attention layer(s) {missed} of {type(model).__name__} did not use the tree: something replaced their "
            "attention function. Expected every layer to call transformers' AttentionInterface; switch off whatever "
            "patches attention (custom kernels, other plugins)."
        )
    missed = sorted({layer_of(mixer) for mixer in recurrent if not mask.state_calls[id(mixer)]})
    if missed:
        raise UnsupportedError(
            f"Recurrent layer(s) {missed} of {type(model).__name__} did not use the tree: something replaced their "
            "forward. Expected every layer to be transformers' own; switch off whatever patches them (custom kernels, "
            "other plugins, accelerate's hooks of a device_map)."
        )


def _shared_calls(model: PreTrainedModel) -> int:
    """In how many layers attention is called that several layers share."""
    return sum(kind.startswith("hybrid") for kind in layer_types(model.config.get_text_config()))


def check_finite(logprobs: torch.Tensor, model: nn.Module) -> None:
    """Waits for the device: the only time in a batch that the tree path does."""
    bad = int((~torch.isfinite(logprobs)).sum())
    if bad:
        raise InvalidInputError(
            f"{type(model).__name__} gave {bad} NaN or infinite log-probs of {logprobs.numel()}. Expected finite "
            "values; check the weights (a diverged run?), the learning rate and the dtype; or on_nonfinite='pass'."
        )
