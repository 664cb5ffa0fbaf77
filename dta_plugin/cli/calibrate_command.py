"""`dta calibrate`: measure how fast a model trains here, as a tree and densely, once; training then decides by it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dta_plugin.cli.terminal import printable
from dta_plugin.errors import InvalidInputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dta_plugin.calibrate import DensePath, Sample
    from dta_plugin.execution.calibration_store import Calibration
    from dta_plugin.tree.cost import ModelCost
    from dta_plugin.tree.time_model import SecondsPerFlop

_NAMES = 32  # characters of the table's first column

_EPILOG = """\
examples:
  dta calibrate --model Qwen/Qwen3-0.6B --autocast bfloat16 --gradient-checkpointing   as TRL trains by default
  dta calibrate --model PATH --lora --seconds 120                                      adapters, measured for longer
  dta calibrate --model PATH --output speeds.json                                      and --dta_calibration speeds.json
  dta calibrate --model PATH rollouts.jsonl --tokenizer PATH                           batches of your own rollouts

what it is for: with measured seconds instead of FLOPs, training
  runs a micro-batch densely where the tree is predicted to be slower (min_saving asks for more than that),
  merges the micro-batches of an accumulation window where that saves time,
  and deals sequences out to micro-batches and ranks by the time they take.

The result is stored in the Hugging Face cache and found again for the same model class and sizes, dtype, autocast,
gradient checkpointing, adapters or all weights, device, CPU threads and version of torch: measure as you train, and
with nothing else running. "dense" is what TRL runs, where TRL is installed, else a plain padded forward pass.

Batches are random tokens, or rollouts of FILE, which is what dta inspect reads: one alone, one of each of several
groups, several of one group around the place where they part, as long as the time allows.
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "calibrate",
        help="measure how fast a model trains here; training then decides by it",
        description="Measure forward and backward passes of a model, as a tree and densely, and store the speeds.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", nargs="?", metavar="FILE", help="rollouts, as for dta inspect; default: random tokens")
    parser.add_argument("--model", required=True, metavar="PATH", help="folder, config.json or hub name")
    parser.add_argument("--tokenizer", metavar="PATH", help="folder, tokenizer.json or hub name, for messages in FILE")
    parser.add_argument("--limit", type=int, default=64, metavar="N", help="the first N rollouts of FILE (default 64)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the weights")
    parser.add_argument("--autocast", choices=("bfloat16", "float16"), help="as a trainer's bf16=True or fp16=True")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, ..; default: a GPU if there is one")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="as TRL trains unless told otherwise")
    parser.add_argument("--lora", action="store_true", help="train LoRA adapters on all linear layers")
    parser.add_argument("--dense", choices=("trl", "padded"), help="the dense path; default: trl if it is installed")
    parser.add_argument("--seconds", type=float, default=60.0, metavar="N", help="about how long to measure (60)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write here instead of the cache")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import torch

    from dta_plugin.calibrate import calibrate
    from dta_plugin.cli.calibrate_batches import file_batches
    from dta_plugin.cli.model_loading import add_lora, device_named, load_model
    from dta_plugin.execution.calibration_store import check_writable
    from dta_plugin.models.introspection import causal_lm, model_cost

    if args.output is not None:
        check_writable(args.output)
    rollouts = None if args.file is None else file_batches(args.file, args.tokenizer, args.limit)
    name = args.dense or ("trl" if find_spec("trl") else "padded")
    model, weights = load_model(args.model, getattr(torch, args.dtype), device_named(args.device))
    dense = _dense_path(name, model)
    if args.lora:
        model = causal_lm(add_lora(model))
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    print(f"{args.model}: {weights}, {args.dtype} on {next(model.parameters()).device}, dense as {name}", flush=True)
    print(printable(rollouts.origin) if rollouts else "batches of random tokens", flush=True)
    found, samples = calibrate(
        model,
        seconds=args.seconds,
        dense=dense,
        dense_path=name,
        return_entropy=name == "trl",
        autocast=getattr(torch, args.autocast) if args.autocast else None,
        batches=rollouts.cases if rollouts else None,
        progress=lambda line: print(f"  {line}", flush=True),
    )
    print("\n".join(_report(found, samples, model_cost(model))), flush=True)
    path = found.save(args.output)
    print(f"\nwrote {path}" + ("" if args.output is None else f"; to use it: --dta_calibration {path}"))
    return 0


def _dense_path(name: str, model: PreTrainedModel) -> DensePath:
    from dta_plugin.calibrate import padded_logprobs

    if name == "padded":
        return padded_logprobs
    if find_spec("trl") is None:
        raise InvalidInputError("--dense trl: TRL is not installed. Expected it beside dta-plugin, or --dense padded.")
    from dta_plugin.adapters.trl.dense import DenseScorer

    return DenseScorer(model)


def _report(found: Calibration, samples: list[Sample], cost: ModelCost) -> Iterator[str]:
    yield ""
    yield f"{'batch':<{_NAMES}}{'dense':>9}{'tree':>10}{'':>8}{'predicted':>20}"
    for s in samples:
        dense, tree = found.dense.seconds(s.dense_work), found.tree.seconds(s.tree_work)
        name = printable(s.name)[: _NAMES - 1]
        yield (
            f"{name:<{_NAMES}}{_ms(s.dense_seconds)}{_ms(s.tree_seconds)}{s.dense_seconds / s.tree_seconds:>7.2f}x"
            f"{_ms(dense)}{_ms(tree)}"
        )
    yield ""
    yield f"tree   {_in_words(found.tree, cost)}"
    yield f"dense  {_in_words(found.dense, cost)}"
    yield f"predictions are within {found.error:.0%} of what was measured"


def _in_words(rates: SecondsPerFlop, cost: ModelCost) -> str:
    seconds = cost.in_seconds(rates)
    return (
        f"{seconds.per_call * 1e3:.2f} ms per call, {seconds.per_token * 1e6:.1f} us per token, "
        f"{seconds.per_pair * 1e9:.2f} ns per pair of tokens, {seconds.per_scored * 1e6:.1f} us per scored token"
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:>7.1f} ms"
