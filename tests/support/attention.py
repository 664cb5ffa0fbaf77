"""Random inputs of the attention op, and a run of a backend with gradients of a random functional."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from dta_plugin import PrefixTree, TreeLayout, TreeMask
from tests.support.trees import Sequences

Attention = Callable[..., torch.Tensor]
Outputs = dict[str, torch.Tensor]


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


OPTIONS: dict[str, Options] = {
    "plain": Options(q_heads=2),
    "grouped": Options(q_heads=6),
    "multi_query": Options(kv_heads=1),
    "window_1": Options(window=1),
    "window_5": Options(window=5),
    "window_beyond_depth": Options(window=10_000),
    "softcap": Options(softcap=2.0),
    "sinks": Options(sinks=True),
    "value_dim": Options(value_dim=6),
    "all_of_it": Options(window=3, softcap=2.0, sinks=True, value_dim=6),
    "window_and_sinks": Options(window=4, sinks=True),
}


def mask_of(sequences: Sequences, backend: str = "auto") -> TreeMask:
    return TreeMask.from_layout(TreeLayout.from_tree(PrefixTree.from_sequences(sequences)), backend)


@dataclass(slots=True)
class Inputs:
    """Leaf tensors q, k, v and sinks for `tokens` tokens, large enough that attention is far from uniform."""

    options: Options
    tokens: int
    dtype: torch.dtype
    leaves: dict[str, torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        o = self.options
        shapes = {
            "q": (1, o.q_heads, self.tokens, o.head_dim),
            "k": (1, o.kv_heads, self.tokens, o.head_dim),
            "v": (1, o.kv_heads, self.tokens, o.value_dim),
            "out": (1, o.q_heads, self.tokens, o.value_dim),
        }
        self.leaves = {name: torch.randn(s, generator=generator, dtype=torch.float64) for name, s in shapes.items()}
        if o.sinks:
            self.leaves["sinks"] = torch.randn(o.q_heads, generator=generator, dtype=torch.float64)
        self.leaves = {name: x.to(torch.bfloat16).to(self.dtype) for name, x in self.leaves.items()}

    def run(self, attention: Attention, mask: TreeMask) -> Outputs:
        """Output and gradients of a fixed random functional of it."""
        weight = self.leaves["out"]
        leaves = {name: x.clone().requires_grad_() for name, x in self.leaves.items() if name != "out"}
        o = self.options
        out = attention(leaves["q"], leaves["k"], leaves["v"], mask, o.scale, o.window, o.softcap, leaves.get("sinks"))
        names = list(leaves)
        grads = torch.autograd.grad((out * weight).sum(), list(leaves.values()))
        return {"out": out.detach(), **dict(zip(names, grads, strict=True))}


def relative_error(actual: Outputs, expected: Outputs) -> float:
    """Largest relative L2 error among the output and the gradients; infinite where there is a NaN.

    Gradients that vanish (a token that sees one key has none in q and k) are judged against 2% of the largest one.
    """
    assert actual.keys() == expected.keys()
    norms = {name: value.double().norm().item() for name, value in expected.items()}
    floor = 0.02 * max(norms.values())
    errors = [
        (actual[name].double() - value.double()).norm() / max(norms[name], floor) for name, value in expected.items()
    ]
    return torch.stack(errors).nan_to_num(nan=float("inf")).max().item()
