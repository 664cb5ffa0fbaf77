"""A trial of tree attention: random inputs, output and gradients of a backend, and how far they may be from the truth.

The truth is the reference in float64. What a backend may differ by is derived from the error of a dense path in the
same dtype, not from a constant. The tests of the kernels and the self-check on users' machines both ask here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from dta_plugin.attention.mask import TreeMask

Attention = Callable[..., torch.Tensor]
Outputs = dict[str, torch.Tensor]

# A few roundings in float32, for results that a dense kernel happens to get exactly right. Like any flash kernel, ours
# leave rounding where the gradients of q and k vanish: those are judged against the size of the other gradients.
ROUNDINGS, FLOOR = 5e-7, 0.2


@dataclass(frozen=True, slots=True)
class Options:
    """Heads and variant of one attention layer."""

    q_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    value_dim: int = 8
    scale: float = 0.5
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False


@dataclass(slots=True)
class Inputs:
    """Leaf tensors q, k, v and sinks for `tokens` tokens, large enough that attention is far from uniform.

    queries: the last so many tokens have queries, None for all. "out" is the weight of the functional.
    """

    options: Options
    tokens: int
    dtype: torch.dtype
    device: torch.device | str = "cpu"
    queries: int | None = None
    leaves: dict[str, torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        o, queries = self.options, self.queries or self.tokens
        shapes = {
            "q": (1, o.q_heads, queries, o.head_dim),
            "k": (1, o.kv_heads, self.tokens, o.head_dim),
            "v": (1, o.kv_heads, self.tokens, o.value_dim),
            "out": (1, o.q_heads, queries, o.value_dim),
        }
        self.leaves = {name: torch.randn(s, generator=generator, dtype=torch.float64) for name, s in shapes.items()}
        if o.sinks:
            self.leaves["sinks"] = torch.randn(o.q_heads, generator=generator, dtype=torch.float64)
        self.leaves = {name: x.to(torch.bfloat16).to(self.device, self.dtype) for name, x in self.leaves.items()}

    def run(self, attention: Attention, mask: TreeMask) -> Outputs:
        """Output and gradients of a fixed random functional of it."""
        weight = self.leaves["out"]
        leaves = {name: x.clone().requires_grad_() for name, x in self.leaves.items() if name != "out"}
        o = self.options
        out = attention(leaves["q"], leaves["k"], leaves["v"], mask, o.scale, o.window, o.softcap, leaves.get("sinks"))
        names = list(leaves)
        grads = torch.autograd.grad((out * weight).sum(), list(leaves.values()))
        return {"out": out.detach(), **dict(zip(names, grads, strict=True))}


def dense_in_own_dtype(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: TreeMask,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """What a dense path would run in the inputs' dtype: torch's attention or, where that has no kernel (soft-caps,
    sinks, unequal head dims), the products and the softmax that transformers writes out."""
    visible = mask.visible(window)[-q.shape[2] :]
    if softcap is None and sinks is None and q.shape[-1] == v.shape[-1]:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale, enable_gqa=True)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(1, -1, q.shape[2], 1)], dim=-1)
    return scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype)[..., : k.shape[2]] @ v


def allowed_error(dense: Outputs, truth: Outputs) -> float:
    """What `relative_error(..., FLOOR)` of a backend may be: twice what the dense path's is in the same dtype."""
    return 2 * relative_error(dense, truth, FLOOR) + ROUNDINGS


def relative_error(actual: Outputs, expected: Outputs, floor: float = 0.02) -> float:
    """Largest relative L2 error among the output and the gradients; infinite where there is a NaN.

    Gradients that vanish (a token that sees one key has none in q and k) are judged against `floor` times the largest.
    """
    assert actual.keys() == expected.keys()
    norms = {name: value.double().norm().item() for name, value in expected.items()}
    smallest = floor * max(norms.values())
    errors = [
        (actual[name].double() - value.double()).norm().cpu() / max(norms[name], smallest)
        for name, value in expected.items()
    ]
    return torch.stack(errors).nan_to_num(nan=float("inf")).max().item()
