"""Forward and backward of the attention op alone: the tree against FlashAttention and FlexAttention. For one GPU.

    python -m benchmarks.attention                         # everything, under 5 minutes on an H200
    python -m benchmarks.attention --workloads target      # the rows that the checks at the end need
    python -m benchmarks.attention --workloads 4096/2048/28 rollouts --dtype float16
    python -m benchmarks.attention --device cpu --smoke    # seconds: tiny shapes, checks the benchmark itself

Workloads: stars `prompt/completion/group`, DualKV's published shapes among them; sequences that share nothing, of equal
and of mixed length; recorded agent rollouts, one sequence per assistant turn. Heads are Qwen3-8B's: 32 query heads, 8
key-value heads, dimension 128. The contenders are described in contenders.py. They run interleaved, each run
on fresh random inputs and a cold cache, and the table shows medians.

How to read a row: TFLOP/s count visible query-key pairs only, 4 * dim * query heads FLOPs per pair forward and 10
backward: the tree's pairs for `tree` and `flex`, every sequence's own for the dense contenders, which compute shared
tokens again. `of matmul` compares with a large matrix product measured in the same run. `memory` is the most that
forward and backward hold beyond their inputs. `tree's speed-up` says how many times faster the tree is, and `ceiling`
what that would be at equal TFLOP/s: dense pairs over tree pairs. Building masks and compiling kernels is not timed: a
training step does the one once for all layers and the other never again.

Before anything is timed, outputs and gradients are compared with dense attention; the run stops if they differ.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.attention.agreement import Disagreement, errors_to_dense
from benchmarks.attention.contenders import Contender, Sample, Setting, candidates, release, warmed_up
from benchmarks.attention.report import checks, contender_table, published_table, summary
from benchmarks.common.harness import (
    environment,
    interleaved,
    mark,
    median_ratio,
    milliseconds,
    synchronize,
    write_json,
)
from benchmarks.common.workloads import ROLLOUTS, rollouts, star, unrelated
from dta_plugin import PrefixTree

VOCAB = 8192
STARS = (
    (16384, 2048, 16),  # the target comes first
    (1024, 2048, 8),
    (4096, 2048, 28),
    (8192, 1024, 32),
    (16384, 2048, 28),
    (32768, 2048, 16),
    (65536, 2048, 16),
)
SMOKE_STARS = ((24, 8, 4), (8, 24, 3))
MIXED_LENGTHS = (512, 1024, 1536, 2048, 3072, 4096, 6144, 8192) * 2
UNSHARED = ("no sharing", "no sharing, mixed lengths")
MIN_ROUNDS = 3

Sequences = list[torch.Tensor]


def main() -> None:
    args = _arguments()
    setting = _setting(args)
    workloads = _workloads(args)
    names = _chosen(args.workloads, workloads)
    seed = torch.seed()
    try:
        errors = errors_to_dense(setting)
    except Disagreement as error:
        sys.exit(str(error))
    shown = [f"{name} {error:.1e}" if isinstance(error, float) else f"{name} {error}" for name, error in errors.items()]
    print(f"relative L2 error to dense attention, outputs and gradients: {'; '.join(shown)}", flush=True)
    matmul = _matmul_tflops(setting, 256 if args.smoke else 8192)
    where = environment(setting.device)
    machine = where["machine"]["accelerator"] or where["machine"]["cpu"]
    print(f"{machine}: matrix product {matmul:.1f} TFLOP/s in {args.dtype}", flush=True)

    rows: list[dict[str, Any]] = []
    for name in names:
        rows.append(_measure(name, workloads[name](), setting, matmul, args.rounds, args.seconds))
        print(summary(rows[-1]), flush=True)
        content = {
            "benchmark": "attention",
            "smoke": args.smoke,
            "device": args.device,
            "dtype": args.dtype,
            "heads": {"query": setting.query_heads, "kv": setting.kv_heads, "dim": setting.head_dim},
            "seed": seed,
            **where,
            "matmul_tflops": matmul,
            "error": errors,
            "rows": rows,
            "checks": checks(rows, next(iter(workloads)), UNSHARED),
        }
        if args.output:
            write_json(args.output, content)
        release()

    print(f"\n{contender_table(rows)}")
    if published := published_table(rows):
        print(f"\nPublished by DualKV, on other machines and not measured here:\n\n{published}")
    print()
    for check in content["checks"]:
        print(f"{check['claim']}: {check['shown']}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu needs --smoke")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16", help="DualKV used float16")
    parser.add_argument("--rounds", type=int, default=10, help="most runs of each contender per workload")
    parser.add_argument(
        "--seconds",
        type=float,
        default=8.0,
        help=f"time per workload that limits the rounds, but {MIN_ROUNDS} always run",
    )
    parser.add_argument(
        "--workloads", nargs="+", metavar="NAME", help='names as the table prints them, or "target"; default: all'
    )
    parser.add_argument("--output", type=Path, help="JSON; default: results/attention_<device>.json, none with --smoke")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes and heads, 2 rounds")
    parser.add_argument("--rollouts", type=Path, default=ROLLOUTS, help="recorded trajectories, gzipped JSON lines")
    args = parser.parse_args()
    if args.device == "cpu" and not args.smoke:
        parser.error("the full shapes need a GPU; add --smoke to run tiny ones on the CPU")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --device cpu --smoke runs tiny shapes on the CPU")
    if args.smoke:
        args.rounds = 2
    elif args.output is None:
        args.output = Path(__file__).parents[1] / "results" / f"attention_{args.device}.json"
    return args


def _setting(args: argparse.Namespace) -> Setting:
    heads = (4, 2, 64) if args.smoke else (32, 8, 128)
    if args.device == "cuda":
        from torch._dynamo import config as dynamo

        # Past its recompile limit torch falls back, silently, to a FlexAttention that writes out all scores.
        dynamo.recompile_limit, dynamo.fail_on_recompile_limit_hit = 64, True
    return Setting(*heads, torch.device(args.device), getattr(torch, args.dtype))


def _workloads(args: argparse.Namespace) -> dict[str, Callable[[], Sequences]]:
    lengths = (8, 16, 40) if args.smoke else MIXED_LENGTHS
    equal = (16, 16, 3) if args.smoke else (2048, 2048, 16)

    def mixed() -> Sequences:
        rows = unrelated(0, max(lengths), len(lengths), VOCAB).sequences
        return [row[:length] for row, length in zip(rows, lengths, strict=True)]

    shapes = SMOKE_STARS if args.smoke else STARS
    found: dict[str, Callable[[], Sequences]] = {
        f"{p}/{c}/{g}": lambda s=(p, c, g): star(*s, VOCAB).sequences for p, c, g in shapes
    }
    found |= {UNSHARED[0]: lambda: unrelated(*equal, VOCAB).sequences, UNSHARED[1]: mixed}
    if args.smoke:
        return found
    if not args.rollouts.exists():
        print(f"rollouts: skipped, {args.rollouts.name} not found; give its path with --rollouts")
        return found
    return found | {"rollouts": lambda: rollouts(args.rollouts, VOCAB).sequences}


def _chosen(wanted: list[str] | None, workloads: Mapping[str, Any]) -> list[str]:
    if wanted is None:
        return list(workloads)
    target = [next(iter(workloads)), *UNSHARED]
    names = list(dict.fromkeys(n for name in wanted for n in (target if name == "target" else [name])))
    if unknown := [name for name in names if name not in workloads]:
        sys.exit(f"No workload named {', '.join(unknown)}. Expected among: target, {', '.join(workloads)}.")
    return names


def _matmul_tflops(setting: Setting, size: int) -> float:
    a, b = (torch.randn(size, size, device=setting.device, dtype=setting.dtype) for _ in range(2))
    times = []
    for _ in range(50):
        start = mark(setting.device)
        torch.mm(a, b)
        times.append((start, mark(setting.device)))
    synchronize(setting.device)
    return 2 * size**3 / statistics.median(milliseconds(*pair) for pair in times[20:]) / 1e9


def _measure(
    name: str, sequences: Sequences, setting: Setting, matmul: float, rounds: int, seconds: float
) -> dict[str, Any]:
    """Time all contenders on one workload."""
    tree = PrefixTree.from_sequences(sequences)
    outcomes = {key: warmed_up(variants) for key, variants in candidates(tree, setting).items()}
    ready = {key: outcome for key, outcome in outcomes.items() if not isinstance(outcome, str)}
    estimate = sum(sample.total_ms for _, sample in ready.values()) / 1e3
    rounds = min(rounds, max(MIN_ROUNDS, int(seconds / max(estimate, 1e-9))))

    samples: dict[str, list[Sample]] = {key: [] for key in ready}
    interleaved(
        {key: contender.run for key, (contender, _) in ready.items()},
        rounds,
        before=lambda: None,
        after=lambda _, key, sample: samples[key].append(sample),
        device=setting.device,
    )
    totals = {key: [sample.total_ms for sample in runs] for key, runs in samples.items()}
    faster = {k: median_ratio(totals[k], totals["tree"]) for k in totals if k != "tree"} if "tree" in totals else {}
    return {
        "name": name,
        "sequences": tree.num_sequences,
        "flat_tokens": tree.flat_tokens,
        "tree_tokens": tree.tree_tokens,
        "ceiling": tree.flat_visible_pairs() / tree.visible_pairs(),
        "rounds": rounds,
        "contenders": {
            key: {"unavailable": outcome}
            if isinstance(outcome, str)
            else _summary(outcome[0], samples[key], setting, matmul)
            for key, outcome in outcomes.items()
        },
        "speed_up_over": faster,
    }


def _summary(contender: Contender, samples: list[Sample], setting: Setting, matmul: float) -> dict[str, Any]:
    per_pair = setting.head_dim * setting.query_heads * contender.pairs
    flop = {"forward": 4 * per_pair, "backward": 10 * per_pair, "total": 14 * per_pair}
    runs = {part: [getattr(sample, f"{part}_ms") for sample in samples] for part in flop}
    median = {part: statistics.median(times) for part, times in runs.items()}
    tflops = {part: flop[part] / median[part] / 1e9 for part in flop}
    return {
        "visible_pairs": contender.pairs,
        "flop": flop,
        "milliseconds": median,
        "tflops": tflops,
        "share_of_matmul": tflops["total"] / matmul,
        "peak_bytes": max(s.peak_bytes for s in samples) if samples[0].peak_bytes is not None else None,
        "input_bytes": sum(buffer.nbytes for buffer in contender.buffers),
        "calls": len(contender.calls),
        "note": contender.note,
        "runs": runs,
    }


if __name__ == "__main__":
    main()
