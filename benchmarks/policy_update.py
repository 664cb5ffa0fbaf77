"""Forward and backward of one policy update: dta-plugin against stock TRL and PrefixGrouper.

    python benchmarks/policy_update.py            # about 20 minutes on one CPU core
    python benchmarks/policy_update.py --rows 1024/64/8 "no sharing"
    python benchmarks/policy_update.py --smoke    # seconds: tiny shapes, checks the benchmark itself

Measured per row: the milliseconds of one forward pass, GRPO-like loss and backward pass (see contenders.py) of a
4-layer Qwen3, without sampling and without the optimizer. Rows (see workloads.py) are stars `prompt/completion/group`,
8 unrelated sequences, and recorded agent rollouts. For these the dense path runs one sequence at a time and
accumulates gradients: padded into one batch they would not fit in memory.

The ceiling is the largest possible speed-up over a dense path that wastes nothing: linear layers counted on tokens,
attention on visible pairs, the LM head on scored tokens (dta_plugin/tree/cost.py). Stock TRL does waste something on
CPUs, so its column can exceed the ceiling; `% of ceiling` is taken against the lean dense path, which does not.

Log-probs, entropies, losses and gradients of all contenders are compared in the same run; the run fails if they differ.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import contenders
import torch
from contenders import Outcome
from harness import CLOCKS, environment, interleaved, median_ratio, table, write_json
from models import MODEL_KEYS, qwen3, random_model
from transformers import PreTrainedModel
from workloads import ROLLOUTS, Workload, rollouts, star, unrelated

from dta_plugin import PrefixTree
from dta_plugin.execution.model import model_cost
from dta_plugin.tree.cost import estimate

STARS = ((1024, 64, 8), (1024, 256, 8), (256, 64, 8), (1024, 64, 2), (128, 512, 8))
SMOKE_STARS = ((48, 8, 4), (8, 24, 3))
DENSE_ROLLOUT_ROUNDS = 2
# Largest relative difference between contenders that rounding explains.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    dtype = getattr(torch, args.dtype)
    model_config = qwen3(layers=2, hidden=64, vocab=512) if args.smoke else qwen3()
    reference = random_model(model_config)
    ceilings = _star_ceilings()
    where = environment(device)

    workloads = _workloads(args, model_config.vocab_size)
    if unknown := sorted(set(args.rows or ()) - set(workloads)):
        sys.exit(f"No row named {', '.join(unknown)}. Expected among: {', '.join(workloads)}.")

    rows = []
    for name in args.rows or workloads:
        work = workloads[name]()
        if work is not None:
            rows.append(_measure(work.to(device), reference, dtype, device, args.rounds, args.clock))
            print(_summary(rows[-1]), flush=True)
    print(f"\n{_table(rows)}")
    if args.output:
        content = {
            "benchmark": "policy_update",
            "smoke": args.smoke,
            "device": args.device,
            "dtype": args.dtype,
            "rounds": args.rounds,
            "clock": args.clock,
            "model": {k: getattr(model_config, k) for k in MODEL_KEYS},
            **where,
            "star_ceilings": ceilings,
            "rows": rows,
        }
        write_json(args.output, content)
    if bad := [row["name"] for row in rows if not max(row["error"].values()) <= TOLERANCE[dtype]]:
        sys.exit(f"Contenders disagree by more than {TOLERANCE[dtype]:.0e} on {', '.join(bad)}: see the error column.")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny model and shapes, 2 rounds")
    parser.add_argument("--rows", nargs="+", help="names of the rows to run, as the table prints them; default: all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="the clock that the table shows")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rollouts", type=Path, default=ROLLOUTS, help="recorded trajectories, gzipped JSON lines")
    args = parser.parse_args()
    if args.smoke:
        args.rounds = min(args.rounds, 2)
    return args


def _workloads(args: argparse.Namespace, vocab: int) -> dict[str, Callable[[], Workload | None]]:
    def recorded() -> Workload | None:
        if not args.rollouts.exists():
            print(f"rollouts: skipped, {args.rollouts.name} not found; give its path with --rollouts")
            return None
        return rollouts(args.rollouts, vocab)

    stars = {f"{p}/{c}/{g}": lambda s=(p, c, g): star(*s, vocab) for p, c, g in (SMOKE_STARS if args.smoke else STARS)}
    if args.smoke:
        return {**stars, "no sharing": lambda: unrelated(16, 16, 3, vocab)}
    return {**stars, "no sharing": lambda: unrelated(256, 256, 8, vocab), "rollouts": recorded}


def _star_ceilings() -> dict[str, float]:
    """Of the full-size rows, also in a smoke run."""
    model = random_model(qwen3())
    return {f"{p}/{c}/{g}": _ceiling(model, star(p, c, g, 8192)) for p, c, g in STARS}


def _ceiling(model: PreTrainedModel, work: Workload) -> float:
    scored = sum(work.completion_lengths)
    return estimate(PrefixTree.from_sequences(work.sequences), model_cost(model), scored, scored).ceiling


def _measure(
    work: Workload, reference: PreTrainedModel, dtype: torch.dtype, device: torch.device, rounds: int, clock: str
) -> dict[str, Any]:
    """Time and compare all contenders on one workload."""
    models: dict[str, PreTrainedModel] = {}
    for name in ("trl", "dense", "prefix_grouper", "tree"):
        models[name] = random_model(reference.config).to(device=device, dtype=dtype)
        models[name].set_attn_implementation("sdpa")
    contenders.prepare_for_trl(models["trl"])
    steps = {name: getattr(contenders, name)(models[name], work) for name in ("trl", "dense", "tree")}
    if work.is_group:
        contenders.prepare_for_prefix_grouper(models["prefix_grouper"])
        steps["prefix_grouper"] = contenders.prefix_grouper(models["prefix_grouper"], work)

    outcomes: dict[str, Outcome] = {}
    gradients: dict[str, dict[str, torch.Tensor]] = {}

    def clear() -> None:
        for model in models.values():
            model.zero_grad(set_to_none=True)

    def keep_first(index: int, name: str, outcome: Outcome) -> None:
        if index == 0:
            outcomes[name] = outcome
            gradients[name] = {key: p.grad.clone() for key, p in models[name].named_parameters()}

    warm_up = 1 if work.micro_batch is None else 0
    if work.micro_batch is not None:
        rounds = min(rounds, DENSE_ROLLOUT_ROUNDS)
    clocks = interleaved(steps, rounds + warm_up, clear, keep_first, device)
    clocks = {c: {name: values[warm_up:] for name, values in by_name.items()} for c, by_name in clocks.items()}
    seconds = clocks[clock]

    tree = PrefixTree.from_sequences(work.sequences)
    return {
        "name": work.name,
        "note": work.note,
        "sequences": tree.num_sequences,
        "scored_tokens": sum(work.completion_lengths),
        "flat_tokens": tree.flat_tokens,
        "tree_tokens": tree.tree_tokens,
        "ceiling": _ceiling(models["tree"], work),
        "milliseconds": {name: 1e3 * statistics.median(values) for name, values in seconds.items()},
        "speed_up_over": {name: median_ratio(seconds[name], seconds["tree"]) for name in seconds if name != "tree"},
        "prefix_grouper_over_trl": (
            median_ratio(seconds["trl"], seconds["prefix_grouper"]) if "prefix_grouper" in seconds else None
        ),
        "error": _errors(outcomes, gradients),
        "seconds": clocks,
    }


def _errors(outcomes: dict[str, Outcome], gradients: dict[str, dict[str, torch.Tensor]]) -> dict[str, float]:
    """Largest relative difference to stock TRL, per contender: log-probs, entropies, loss, every gradient."""
    expected, expected_gradients = outcomes["trl"], gradients["trl"]
    floor = 1e-3 * max(g.norm().item() for g in expected_gradients.values())
    errors = {}
    for name in outcomes.keys() - {"trl"}:
        pairs = [(getattr(outcomes[name], f), getattr(expected, f), 1.0) for f in ("loss", "logprobs", "entropies")]
        pairs += [(gradients[name][key], g, floor) for key, g in expected_gradients.items()]
        errors[name] = max(_relative(actual, wanted, least) for actual, wanted, least in pairs)
    return errors


def _relative(actual: torch.Tensor, expected: torch.Tensor, floor: float) -> float:
    """|actual - expected| / |expected| in the 2-norm, with |expected| at least `floor`; infinite if anything is NaN."""
    error = (actual.double() - expected.double()).norm().item() / max(expected.double().norm().item(), floor)
    return error if math.isfinite(error) else math.inf


def _share(row: dict[str, Any]) -> float:
    """Share of the ceiling that the tree reaches."""
    return row["speed_up_over"]["dense"] / row["ceiling"]


def _summary(row: dict[str, Any]) -> str:
    times = ", ".join(f"{name} {value:.0f} ms" for name, value in row["milliseconds"].items())
    note = f" ({row['note']})" if row["note"] else ""
    return f"{row['name']}{note}: {times}"


def _table(rows: list[dict[str, Any]]) -> str:
    header = (
        "row",
        "tokens flat -> tree",
        "ceiling",
        "TRL ms",
        "lean dense ms",
        "PrefixGrouper ms",
        "ours ms",
        "ours vs TRL",
        "ours vs lean dense",
        "% of ceiling",
        "PrefixGrouper vs TRL",
        "ours vs PrefixGrouper",
        "max error",
    )

    def milliseconds(row: dict[str, Any], name: str) -> str:
        return f"{row['milliseconds'][name]:.0f}" if name in row["milliseconds"] else "-"

    def times(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}x"

    body = [
        (
            row["name"],
            f"{row['flat_tokens']} -> {row['tree_tokens']}",
            times(row["ceiling"]),
            milliseconds(row, "trl"),
            milliseconds(row, "dense"),
            milliseconds(row, "prefix_grouper"),
            milliseconds(row, "tree"),
            times(row["speed_up_over"]["trl"]),
            times(row["speed_up_over"]["dense"]),
            f"{_share(row):.0%}",
            times(row["prefix_grouper_over_trl"]),
            times(row["speed_up_over"].get("prefix_grouper")),
            f"{max(row['error'].values()):.0e}",
        )
        for row in rows
    ]
    return table(header, body)


if __name__ == "__main__":
    main()
