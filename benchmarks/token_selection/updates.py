"""What updates on a random subset of tokens (NAT) save: rpc and urs at half of the tokens, beside all of them.

    python -m benchmarks.token_selection.updates                     # about 12 minutes on one CPU core
    python -m benchmarks.token_selection.updates --rows 128/512/8    # some rows
    python -m benchmarks.token_selection.updates --smoke             # seconds: tiny shapes, checks the benchmark itself

Measured: one forward pass, GRPO-like loss and backward pass of a 4-layer Qwen3 (contenders.py), without sampling
and without the optimizer. Rows: stars `prompt/completion/group`; recorded agent rollouts with every assistant turn a
sequence, as verl trains them; and the same trials as one sequence each, as TRL does. There the dense path runs one
sequence at a time, and once.

How to read the first table: `tokens` are those of the sequences as they were cut, `run` those of their tree, `scored`
the log-probs that the LM head computed, `kept` the share of completion tokens that carry loss. Selections draw anew in
every round: numbers are means, with the range of what varies. `vs` columns are times faster, as the median over rounds.
`saved` is the most that autograd holds for the backward pass at a time, as the mean over rounds, and the range.

A prefix cut saves what nothing else needs. Where every turn is a sequence, a turn's text is also the prompt of the next
one, and only the last turns of a trial can be cut; where a trial is one sequence, half of it can.

The second table is about the gradient: the error of one drawing relative to all tokens' gradient, that of the mean over
the drawings, and what is expected of that mean: the error of one over the square root of their number. Two things are
required, or the run fails: the dense path and the tree agree, and a budget of 1 gives the tree's gradient.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Qwen3Config

from benchmarks.common.backward import SavedBytes, gradient_error
from benchmarks.common.harness import CLOCKS, environment, interleaved, median_ratio, write_json
from benchmarks.common.models import MODEL_KEYS, qwen3, random_model
from benchmarks.common.workloads import ROLLOUTS, Workload, rollouts, star, trajectories
from benchmarks.token_selection import contenders
from benchmarks.token_selection.contenders import Deviation, Size, Step
from benchmarks.token_selection.updates_report import gradient_table, summary, update_table
from dta_plugin.token_selection.select import TokenSelection

STARS, SMOKE_STARS = ((1024, 256, 8), (128, 512, 8)), ((24, 16, 4),)
SELECTIONS = {"rpc": TokenSelection(scheme="rpc", budget=0.5), "urs": TokenSelection(scheme="urs", budget=0.5)}
# Largest relative difference that rounding explains: between dense and tree, between budget 1 and tree.
TOLERANCE = {torch.float32: (1e-4, 1e-6), torch.bfloat16: (5e-2, 1e-2)}


@dataclass(frozen=True, slots=True)
class Update:
    """One update: its size, the most bytes that autograd held, and that a CUDA device did beyond what it held."""

    size: Size
    saved_bytes: int
    device_bytes: int | None


def main() -> None:
    args = _arguments()
    gc.freeze()  # garbage is collected before every run, but not searched for among all that was imported
    atexit.register(gc.unfreeze)
    torch.set_num_threads(args.threads)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    where = environment(device)
    config = qwen3(2, 64, 512) if args.smoke else qwen3()
    workloads = _workloads(args, config.vocab_size)
    if unknown := sorted(set(args.rows or ()) - set(workloads)):
        sys.exit(f"No row named {', '.join(unknown)}. Expected among: {', '.join(workloads)}.")
    rows = []
    for name in args.rows or workloads:
        work = workloads[name]()
        rows.append(_measure(work.to(device), config, dtype, args.rounds, args.drawings, args.clock))
        print(summary(rows[-1]), flush=True)
    print(f"\n{update_table(rows)}\n\n{gradient_table(rows)}")
    if args.output:
        content = {
            "benchmark": "token_selection",
            "smoke": args.smoke,
            "device": args.device,
            "dtype": args.dtype,
            "rounds": args.rounds,
            "clock": args.clock,
            "model": {key: getattr(config, key) for key in MODEL_KEYS},
            "selections": {name: asdict(selection) for name, selection in SELECTIONS.items()},
            **where,
            "rows": rows,
        }
        write_json(args.output, content)
    if bad := disagreements(rows, TOLERANCE[dtype]):
        sys.exit("\n".join(bad))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny model and shapes, 2 rounds, no rollouts")
    parser.add_argument("--rows", nargs="+", help="names of the rows to run, as the table prints them; default: all")
    parser.add_argument("--rounds", type=int, default=5, help="timed, each with a drawing of its own")
    parser.add_argument("--drawings", type=int, default=8, help="for the gradient: rounds, and untimed runs after them")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=tuple(CLOCKS), help="that the table shows; default: cpu with one CPU thread")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rollouts", type=Path, default=ROLLOUTS, help="recorded trajectories, gzipped JSON lines")
    args = parser.parse_args()
    if args.smoke:
        args.rounds = min(args.rounds, 2)
    if args.clock is None:
        args.clock = "cpu" if args.device == "cpu" and args.threads == 1 else "wall"
    return args


def _workloads(args: argparse.Namespace, vocab: int) -> dict[str, Callable[[], Workload]]:
    stars = SMOKE_STARS if args.smoke else STARS
    found: dict[str, Callable[[], Workload]] = {
        f"{p}/{c}/{g}": lambda s=(p, c, g): star(*s, vocab) for p, c, g in stars
    }
    if args.smoke:
        return found
    if not args.rollouts.exists():
        print(f"rollouts: skipped, {args.rollouts.name} not found; give its path with --rollouts")
        return found
    recorded = {"trajectories": trajectories, "rollouts": rollouts}
    return found | {name: lambda build=build: build(args.rollouts, vocab) for name, build in recorded.items()}


def _measure(
    work: Workload, config: Qwen3Config, dtype: torch.dtype, rounds: int, drawings: int, clock: str
) -> dict[str, Any]:
    """Time all contenders on one workload, and compare their gradients."""
    device = work.advantages.device
    models = {name: random_model(config).to(device, dtype) for name in ("dense", "tree")}
    models["dense"].set_attn_implementation("sdpa")
    on_tree = models["tree"]
    steps = {"dense": contenders.dense(models["dense"], work), "tree": contenders.tree(on_tree, work)}
    steps |= {name: contenders.on_subset(on_tree, work, chosen) for name, chosen in SELECTIONS.items()}
    watched = {name: _watched(models.get(name, on_tree), step) for name, step in steps.items()}
    updates: dict[str, list[Update]] = {name: [] for name in steps}
    deviations: dict[str, Deviation] = {}
    errors: dict[str, float] = {}

    def clear() -> None:
        for model in models.values():
            model.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    clear()
    watched["tree"]()  # warm-up, and what all others are compared with
    whole = _gradients(on_tree)

    def keep(_round: int, name: str, update: Update) -> None:
        updates[name].append(update)
        if name in SELECTIONS:
            deviations.setdefault(name, Deviation(whole)).add(_gradients(on_tree))
        elif name not in errors:
            errors[name] = gradient_error(_gradients(models[name]), whole)

    once = ["dense"] if work.micro_batch else []
    clocks = interleaved({n: run for n, run in watched.items() if n not in once}, rounds, clear, keep, device)
    if once:
        alone = interleaved({n: watched[n] for n in once}, 1, clear, keep, device)
        clocks = {each: alone[each] | clocks[each] for each in clocks}
    seconds = clocks[clock]
    for name in SELECTIONS:
        for index in range(rounds, drawings):
            clear()
            keep(index, name, watched[name]())
        clear()
        contenders.on_subset(on_tree, work, _all_tokens(SELECTIONS[name]))()
        errors[f"{name}, budget 1"] = gradient_error(_gradients(on_tree), whole)
    return {
        "name": work.name,
        "note": work.note,
        "sequences": len(work.sequences),
        "rounds": {name: len(values) for name, values in updates.items()},
        "updates": {name: [asdict(update) for update in values] for name, values in updates.items()},
        "milliseconds": {name: [1e3 * value for value in values] for name, values in seconds.items()},
        "faster_than": {
            slow: {name: _faster(seconds[slow], values) for name, values in seconds.items()}
            for slow in ("dense", "tree")
        },
        "gradient": {name: deviation.result() for name, deviation in deviations.items()},
        "error": errors,
        "seconds": clocks,
    }


def _watched(model: PreTrainedModel, step: Step) -> Callable[[], Update]:
    saved, device = SavedBytes(model), model.device

    def run() -> Update:
        saved.peak = saved.live
        held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda held: held.tensor):
            size = step()
        peak = torch.cuda.max_memory_allocated(device) - held if device.type == "cuda" else None
        return Update(size, saved.peak, peak)

    return run


def _faster(slow: list[float], fast: list[float]) -> float:
    """Median over rounds of how many times faster; what ran once counts in every round."""
    rounds = max(len(slow), len(fast))
    return median_ratio(*(values * rounds if len(values) == 1 else values for values in (slow, fast)))


def _gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _all_tokens(selection: TokenSelection) -> TokenSelection:
    return TokenSelection(scheme=selection.scheme, budget=1.0)


def disagreements(rows: list[dict[str, Any]], allowed: tuple[float, float]) -> list[str]:
    """A line for every contender that is not what it has to be. allowed: of the dense path, of a budget of 1."""
    found = []
    for row in rows:
        for name, error in row["error"].items():
            most = allowed[1] if "budget 1" in name else allowed[0]
            if not error <= most:
                found.append(f"{row['name']}: gradients of {name!r} are {error:.1e} off the tree's, over {most:.0e}.")
    return found


if __name__ == "__main__":
    main()
