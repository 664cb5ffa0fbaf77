r"""Forward and backward of one policy update: dta-plugin against stock TRL and PrefixGrouper.

    python -m benchmarks.policy_update            # about 20 minutes on one CPU core
    python -m benchmarks.policy_update --rows 1024/64/8 "no sharing"
    python -m benchmarks.policy_update --model small-hybrid --contenders trl dense nodes tree    # Qwen3.5's layers
    python -m benchmarks.policy_update --smoke    # seconds: tiny shapes, checks the benchmark itself
    python -m benchmarks.policy_update --device cuda --dtype bfloat16 --model qwen3-4b --checkpointing \
        --micro-batch 1 --contenders trl prefix_grouper flex tree --rows 4096/1024/16 rollouts

Measured per row: the milliseconds of one forward pass, GRPO-like loss and backward pass (see common/updates.py) of a
4-layer Qwen3, or of one of a released size, without sampling and without the optimizer. Rows (common/workloads.py) are
stars `prompt/completion/group`, 8 unrelated sequences, and recorded agent rollouts. For these the dense path runs one
sequence at a time and accumulates gradients: padded into one batch they would not fit in memory. `--micro-batch` makes
it do so on stars. `--rows comb` is one agent: 12 turns of 200 tokens, each with 100 of its own behind it.

The ceiling is the largest possible speed-up over a dense path that wastes nothing: linear layers counted on tokens,
attention on visible pairs, the LM head on scored tokens (dta_plugin/tree/cost.py). Stock TRL does waste something on
CPUs, so its column can exceed the ceiling; `% of ceiling` is taken against the lean dense path, which does not.

On GPUs every contender runs once beforehand; one that cannot, for want of memory or otherwise, is named and left out.
The dense paths and the tree are loaded with flash_attention_2 where flash-attn is installed, else with SDPA. GB: the
most that a contender held beyond the weights.

Log-probs, entropies, losses and gradients of all contenders are compared in the same run; the run fails if they differ.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.common.harness import CLOCKS, environment, interleaved, median_ratio, write_json
from benchmarks.common.models import MODEL_KEYS, MODELS, qwen3, random_model, twin, with_lora, without_adapters
from benchmarks.common.updates import Outcome, Step
from benchmarks.common.workloads import ROLLOUTS, Workload, comb, rollouts, star, unrelated
from benchmarks.policy_update.contenders import CONTENDERS, PREPARE
from benchmarks.policy_update.report import NAMES, last_line, summary, update_table
from dta_plugin import PrefixTree
from dta_plugin.models.introspection import model_cost
from dta_plugin.tree.cost import estimate

STARS = ((1024, 64, 8), (1024, 256, 8), (256, 64, 8), (1024, 64, 2), (128, 512, 8))
SMOKE_STARS = ((48, 8, 4), (8, 24, 3))
DENSE_ROLLOUT_ROUNDS = 2
ROLLOUT_VOCAB = 8192  # the same tokens for every model
# Largest relative difference between contenders that rounding explains. In bfloat16 it grows with the root of the
# number of micro-batches: the dense paths' gradients are rounded after every one of them.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    dtype = getattr(torch, args.dtype)
    model_config = qwen3(layers=2, hidden=64, vocab=512) if args.smoke else MODELS[args.model]()
    reference = _reference(args, model_config, device, dtype)
    ceilings = _star_ceilings()
    where = environment(device)

    workloads = _workloads(args, model_config.vocab_size)
    if unknown := sorted(set(args.rows or ()) - set(workloads)):
        sys.exit(f"No row named {', '.join(unknown)}. Expected among: {', '.join(workloads)}, or other P/C/G.")

    rows: list[dict[str, Any]] = []
    content = {
        "benchmark": "policy_update",
        "smoke": args.smoke,
        "device": args.device,
        "dtype": args.dtype,
        "rounds": args.rounds,
        "clock": args.clock,
        "model": {k: getattr(model_config, k) for k in MODEL_KEYS},
        "lora": args.lora,
        "checkpointing": args.checkpointing,
        "attention": without_adapters(reference).config._attn_implementation,
        **where,
        "star_ceilings": ceilings,
        "rows": rows,
    }
    for name in args.rows or workloads:
        work = workloads[name]()
        if work is None:
            continue
        if args.micro_batch is not None and work.micro_batch is None:
            work = replace(work, micro_batch=args.micro_batch)
        rows.append(_measure(work.to(device), reference, args.contenders, args.rounds, args.clock))
        print(summary(rows[-1]), flush=True)
        if args.output:
            write_json(args.output, content)
    print(f"\n{update_table(rows)}\n\n{last_line(rows)}")
    if not all("tree" in row["milliseconds"] for row in rows):
        sys.exit("The tree did not run on every row: see above.")
    if bad := [row["name"] for row in rows if not max(row["error"].values(), default=0.0) <= row["tolerance"]]:
        sys.exit(f"Contenders disagree by more than rounding explains on {', '.join(bad)}: see the error column.")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny model and shapes, 2 rounds")
    parser.add_argument("--rows", nargs="+", help="names of the rows to run, as the table prints them; default: all")
    parser.add_argument("--model", choices=tuple(MODELS), default="small", help="which sizes; --smoke takes tiny ones")
    parser.add_argument("--lora", action="store_true", help="train adapters on every linear layer, nothing else")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing, for every contender")
    parser.add_argument("--micro-batch", type=int, help="sequences per call of the dense paths, on stars; default: all")
    parser.add_argument(
        "--contenders", nargs="+", choices=tuple(NAMES), default=["trl", "dense", "prefix_grouper", "tree"]
    )
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
        return rollouts(args.rollouts, min(vocab, ROLLOUT_VOCAB))

    named = [tuple(map(int, name.split("/"))) for name in args.rows or () if re.fullmatch(r"\d+/\d+/\d+", name)]
    shapes = [*(SMOKE_STARS if args.smoke else STARS), *named]
    stars = {f"{p}/{c}/{g}": lambda s=(p, c, g): star(*s, vocab) for p, c, g in shapes}
    if args.smoke:
        return {**stars, "no sharing": lambda: unrelated(16, 16, 3, vocab)}
    found: dict[str, Callable[[], Workload | None]] = {
        **stars,
        "no sharing": lambda: unrelated(256, 256, 8, vocab),
        "rollouts": recorded,
    }
    return found | ({"comb": lambda: comb(12, 200, 100, vocab)} if "comb" in (args.rows or ()) else {})


def _reference(args: argparse.Namespace, config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """The model whose weights all contenders share."""
    model = random_model(config, device).to(dtype)
    flash = device.type == "cuda" and dtype != torch.float32 and find_spec("flash_attn") is not None
    model.set_attn_implementation("flash_attention_2" if flash else "sdpa")
    if args.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return with_lora(model) if args.lora else model


def _star_ceilings() -> dict[str, float]:
    """Of the full-size rows, also in a smoke run."""
    model = random_model(qwen3())
    return {f"{p}/{c}/{g}": _ceiling(model, star(p, c, g, 8192)) for p, c, g in STARS}


def _ceiling(model: PreTrainedModel, work: Workload) -> float:
    scored = sum(work.completion_lengths)
    return estimate(PrefixTree.from_sequences(work.sequences), model_cost(model), scored, scored).ceiling


def _measure(work: Workload, reference: Any, names: list[str], rounds: int, clock: str) -> dict[str, Any]:
    """Time and compare the contenders on one workload."""
    device = work.advantages.device
    models, steps = _steps(work, reference, names)
    outcomes: dict[str, Outcome] = {}
    gradients: dict[str, dict[str, torch.Tensor]] = {}
    peaks: dict[str, int] = {}
    held = 0

    def clear() -> None:
        nonlocal held
        reference.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            held = torch.cuda.memory_allocated(device)

    def keep(index: int, name: str, outcome: Outcome) -> None:
        if device.type == "cuda":
            peaks[name] = max(peaks.get(name, 0), torch.cuda.max_memory_allocated(device) - held)
        if index == 0:
            outcomes[name] = outcome
            trained = ((key, p.grad) for key, p in models[name].named_parameters())
            gradients[name] = {key: gradient.clone() for key, gradient in trained if gradient is not None}

    unavailable = _tried(steps, clear) if device.type == "cuda" else {}
    warm_up = 1 if work.micro_batch is None else 0
    if work.micro_batch is not None:
        rounds = min(rounds, DENSE_ROLLOUT_ROUNDS)
    clocks = interleaved(steps, rounds + warm_up, clear, keep, device)
    clocks = {c: {name: values[warm_up:] for name, values in by_name.items()} for c, by_name in clocks.items()}
    seconds = clocks[clock]
    clear()

    def over(slow: str, fast: str) -> float | None:
        return median_ratio(seconds[slow], seconds[fast]) if slow in seconds and fast in seconds else None

    tree = PrefixTree.from_sequences(work.sequences)
    return {
        "name": work.name,
        "note": work.note,
        "sequences": tree.num_sequences,
        "scored_tokens": sum(work.completion_lengths),
        "flat_tokens": tree.flat_tokens,
        "tree_tokens": tree.tree_tokens,
        "ceiling": _ceiling(without_adapters(reference), work),
        "milliseconds": {name: 1e3 * statistics.median(values) for name, values in seconds.items()},
        "speed_up_over": {name: over(name, "tree") for name in seconds if name != "tree" and "tree" in seconds},
        "prefix_grouper_over_trl": over("trl", "prefix_grouper"),
        "peak_bytes": peaks,
        "unavailable": unavailable,
        "error": _errors(outcomes, gradients),
        "tolerance": _tolerance(work, without_adapters(reference).dtype),
        "seconds": clocks,
    }


def _steps(work: Workload, reference: Any, names: list[str]) -> tuple[dict[str, Any], dict[str, Step]]:
    """Per contender a model, all with the same parameters, and its step."""
    on_cpu = work.advantages.device.type == "cpu"
    is_hybrid = "linear_attention" in (getattr(without_adapters(reference).config, "layer_types", None) or ())
    impossible = {"prefix_grouper": is_hybrid or not work.is_group, "flex": on_cpu, "nodes": not is_hybrid}
    impossible["tree_recurrence"] = not is_hybrid or find_spec("tree_recurrence") is None
    models = {name: twin(reference) for name in names if not impossible.get(name)}
    for name in models.keys() & PREPARE.keys():
        PREPARE[name](models[name])
    return models, {name: CONTENDERS[name](model, work) for name, model in models.items()}


def _tried(steps: dict[str, Step], clear: Callable[[], None]) -> dict[str, str]:
    """Runs every step once: kernels are compiled. Takes out those that fail, and says why."""
    failed = {}
    for name, step in list(steps.items()):
        clear()
        try:
            step()
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error) else ''}"
            del steps[name]
        torch.cuda.empty_cache()
    return failed


def _errors(outcomes: dict[str, Outcome], gradients: dict[str, dict[str, torch.Tensor]]) -> dict[str, float]:
    """Largest relative difference to stock TRL, or to the first contender that ran: log-probs, entropies, loss, every
    gradient."""
    if not outcomes:
        return {}
    first = next(iter(outcomes))
    expected, expected_gradients = outcomes[first], gradients[first]
    floor = 1e-3 * max(g.norm().item() for g in expected_gradients.values())
    errors = {}
    for name in outcomes.keys() - {first}:
        pairs = [(getattr(outcomes[name], f), getattr(expected, f), 1.0) for f in ("loss", "logprobs", "entropies")]
        pairs += [(gradients[name][key], g, floor) for key, g in expected_gradients.items()]
        errors[name] = max(_relative(actual, wanted, least) for actual, wanted, least in pairs)
    return errors


def _tolerance(work: Workload, dtype: torch.dtype) -> float:
    calls = math.ceil(len(work.sequences) / (work.micro_batch or len(work.sequences)))
    return TOLERANCE[dtype] * (math.sqrt(calls) if dtype == torch.bfloat16 else 1.0)


def _relative(actual: torch.Tensor, expected: torch.Tensor, floor: float) -> float:
    """|actual - expected| / |expected| in the 2-norm, with |expected| at least `floor`; infinite if anything is NaN."""
    error = (actual.double() - expected.double()).norm().item() / max(expected.double().norm().item(), floor)
    return error if math.isfinite(error) else math.inf


if __name__ == "__main__":
    main()
