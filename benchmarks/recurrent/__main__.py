"""Recurrent operations alone, forward and backward: the tree against transformers' own functions on padded batches.

    python -m benchmarks.recurrent --op delta --tree star     # some of it
    python -m benchmarks.recurrent --smoke                    # seconds

`tokens` is the size of the padded batch over that of the tree: what a speed-up would be if time went by tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention
from transformers.models.qwen3_next.modeling_qwen3_next import causal_conv1d_fn, torch_chunk_gated_delta_rule

from benchmarks.common.harness import environment, interleaved, median_ratio, table, write_json
from dta_plugin.recurrent.convolution import tree_causal_conv1d
from dta_plugin.recurrent.delta_rule import tree_gated_delta_rule, tree_kda
from dta_plugin.recurrent.plan import StatePlan

Tensors = list[torch.Tensor]


@dataclass(frozen=True, slots=True)
class Operation:
    """inputs: (tokens) -> [1, T, ...] tensors. tree: of those and the plan. dense: of [B, L, ...] in their place."""

    inputs: Callable[[int], Tensors]
    tree: Callable[[Tensors, StatePlan], torch.Tensor]
    dense: Callable[[Tensors], torch.Tensor]


def operations(heads: int, width: int) -> dict[str, Operation]:
    """By name. Convolutions are as wide as queries, keys and values together."""
    channels = 3 * heads * width
    weight, bias = torch.randn(channels, 4, requires_grad=True), torch.randn(channels, requires_grad=True)

    def delta(*decay: int) -> Callable[[int], Tensors]:
        return lambda tokens: [
            *(torch.randn(1, tokens, heads, width) for _ in range(3)),
            -torch.randn(1, tokens, heads, *decay).exp(),
            torch.rand(1, tokens, heads),
        ]

    def on_tree(op: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> Callable[[Tensors, StatePlan], torch.Tensor]:
        return lambda x, plan: op(*x, plan, use_qk_l2norm_in_kernel=True)[0]

    return {
        "conv": Operation(
            lambda tokens: [torch.randn(1, tokens, channels)],
            lambda x, plan: tree_causal_conv1d(x[0].mT, weight, bias, "silu", plan)[0].mT,
            lambda x: causal_conv1d_fn(x[0].mT, weight, bias, "silu").mT,
        ),
        "delta": Operation(
            delta(),
            on_tree(tree_gated_delta_rule),
            lambda x: torch_chunk_gated_delta_rule(*x, use_qk_l2norm_in_kernel=True)[0],
        ),
        "kda": Operation(
            delta(width),
            on_tree(tree_kda),
            lambda x: chunk_kimi_delta_attention(*x, use_qk_l2norm_in_kernel=True)[0],
        ),
    }


def star(prompt: int, answer: int, count: int) -> StatePlan:
    return StatePlan.from_depth(np.concatenate([np.arange(prompt), *[np.arange(prompt, prompt + answer)] * count]))


def comb(turns: int, shared: int, own: int) -> StatePlan:
    """Every turn goes on from the shared part of the one before, and has an answer of its own."""
    parts = [np.arange(turn * shared, turn * shared + shared + own) for turn in range(turns)]
    depth = np.concatenate([np.arange(turns * shared), *(part[shared:] for part in reversed(parts))])
    return StatePlan.from_depth(depth)


TREES = {
    "star 1024/256/8": lambda: star(1024, 256, 8),
    "star 1024/64/8": lambda: star(1024, 64, 8),
    "star 130/37/5": lambda: star(130, 37, 5),
    "comb 12 x (200 + 100)": lambda: comb(12, 200, 100),
    "nothing shared 8 x 512": lambda: star(0, 512, 8),
}
SMOKE_TREES = {"star 20/5/3": lambda: star(20, 5, 3)}


def paths(plan: StatePlan) -> Iterator[list[int]]:
    """The tokens of every row: from a root down to a token without children."""
    for leaf in sorted(set(range(len(plan))) - set(plan.parent.tolist())):
        row = [leaf]
        while (parent := int(plan.parent[row[-1]])) >= 0:
            row.append(parent)
        yield row[::-1]


def measure(operation: Operation, plan: StatePlan, rounds: int) -> dict[str, float]:
    rows = list(paths(plan))
    longest = max(map(len, rows))
    index = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    own = operation.inputs(len(plan))
    padded = [x[0][index] for x in own]
    outs: dict[str, torch.Tensor] = {}

    def step(run: Callable[[Tensors], torch.Tensor], inputs: Tensors) -> torch.Tensor:
        out = run([x.detach().requires_grad_() for x in inputs])
        out.backward(torch.ones_like(out))
        return out.detach()

    contenders = {
        "tree": lambda: step(lambda x: operation.tree(x, plan), own),
        "dense": lambda: step(operation.dense, padded),
    }
    seconds = interleaved(
        contenders, rounds + 1, lambda: None, lambda _, name, out: outs.update({name: out}), torch.device("cpu")
    )
    gaps = [(outs["tree"][0][row] - outs["dense"][i, : len(row)]).abs().max() for i, row in enumerate(rows)]
    ratios = {clock: median_ratio(of["dense"][1:], of["tree"][1:]) for clock, of in seconds.items()}
    best = {f"{name}_ms": 1e3 * min(seconds["cpu"][name][1:]) for name in contenders}
    return {"tokens": index.numel() / len(plan), **ratios, **best, "difference": float(torch.stack(gaps).max())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=("conv", "delta", "kda"), nargs="+", default=("conv", "delta", "kda"))
    parser.add_argument("--tree", default="", help="only trees whose name has this in it")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=64, help="of a head")
    parser.add_argument("--rounds", type=int, default=3, help="after one that is not counted")
    parser.add_argument("--smoke", action="store_true", help="a tiny tree")
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for name in options.op:
        for tree, build in (SMOKE_TREES if options.smoke else TREES).items():
            if options.tree in tree:
                operation = operations(options.heads, options.width)[name]
                rows.append({"op": name, "tree": tree, **measure(operation, build(), options.rounds)})
                print(
                    ", ".join(f"{key} {x:.3g}" if isinstance(x, float) else x for key, x in rows[-1].items()),
                    flush=True,
                )
    header = ["op", "tree", "tokens", "CPU time", "of tokens", "wall", "difference"]
    cells = [
        [
            row["op"],
            row["tree"],
            f"{row['tokens']:.2f}",
            f"{row['cpu']:.2f}x",
            f"{row['cpu'] / row['tokens']:.2f}",
            f"{row['wall']:.2f}x",
            f"{row['difference']:.1e}",
        ]
        for row in rows
    ]
    print(table(header, cells))
    if options.output:
        write_json(options.output, {**environment(torch.device("cpu")), "rows": rows})


if __name__ == "__main__":
    main()
