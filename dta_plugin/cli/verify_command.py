"""`dta verify`: tree against dense on a real model, log-probs and gradients of every parameter. Exit code 1 on FAIL."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from dta_plugin.errors import InvalidInputError

if TYPE_CHECKING:
    from torch import nn

    from dta_plugin.cli.verify_batches import VerifyBatch
    from dta_plugin.config import TreeConfig
    from dta_plugin.execution.probing.tree_difference import Difference
    from dta_plugin.tree import TreeReport

_DTYPES = ("float64", "float32", "bfloat16", "float16")
_WORST = 3  # parameters listed
_REPEATS = 2  # timed runs of each path; the faster one counts

_EPILOG = """\
examples:
  dta verify --model Qwen/Qwen3-0.6B                           random tokens: answers to one prompt, two turns
  dta verify --model PATH rollouts.jsonl --tokenizer PATH      eight of your own rollouts
  dta verify --model PATH --dtype bfloat16 --device cuda       the precision and device you train with
  dta verify --model PATH --executor streamed                  chunk by chunk, as trees larger than memory run
  dta verify --model PATH/config.json                          random weights, for a model that is not downloaded

what is compared: the log-prob of every token, and the gradient of a random weighting of all log-probs with respect to
every parameter; the unmodified model runs each sequence by itself. A wrong attention mask gives log-prob differences
of 0.1 nats and gradient errors near 1. Allowed are rounding errors only, as measured on the same batch: the unmodified
model runs it once more with its input embeddings moved by up to half a rounding step. Log-probs may differ by 3 times
as much, on average and at most, a parameter's gradient by 4 times.

exit code: 0 PASS, 1 FAIL or a model that cannot run as a tree, 2 unusable input.
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "verify",
        help="tree against dense on your model",
        description="Run a model dense and as a tree: do log-probs and gradients agree, and which is faster?",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", nargs="?", metavar="FILE", help="rollouts, as for dta inspect; default: random tokens")
    parser.add_argument("--model", required=True, metavar="PATH", help="folder, config.json or hub name")
    parser.add_argument("--tokenizer", metavar="PATH", help="folder, tokenizer.json or hub name, for messages in FILE")
    parser.add_argument("--limit", type=int, default=8, metavar="N", help="N rollouts, group by group (default 8)")
    parser.add_argument(
        "--max-tokens", type=int, default=1024, metavar="N", help="N tokens of each, around the first fork (1024)"
    )
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="default float32, the sharpest test")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, ..; default: a GPU if there is one")
    parser.add_argument("--executor", choices=("packed", "streamed"), default="packed", help="default packed")
    parser.add_argument("--lora", action="store_true", help="compare gradients of LoRA adapters on all linear layers")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import torch

    from dta_plugin.cli.model_loading import add_lora, device_named, load_model
    from dta_plugin.cli.terminal import printable, waiting
    from dta_plugin.cli.verify_batches import file_batch, random_batch
    from dta_plugin.config import TreeConfig
    from dta_plugin.verify import compare

    if args.limit < 1 or args.max_tokens < 8:
        raise InvalidInputError(f"--limit {args.limit}, --max-tokens {args.max_tokens}. Expected at least 1 and 8.")
    dtype = getattr(torch, args.dtype)
    base, weights = load_model(args.model, dtype, device_named(args.device))
    if args.file is None:
        batch = random_batch(base.config.get_text_config().vocab_size, args.max_tokens)
    else:
        batch = file_batch(args.file, args.tokenizer, args.limit, args.max_tokens)
    model = add_lora(base) if args.lora else base
    print(f"{printable(args.model)}: {weights}, {args.dtype} on {next(model.parameters()).device}")
    print(printable(batch.origin), flush=True)
    longest = max(map(len, batch.sequences))
    config = TreeConfig(executor=args.executor, probe="off")
    if args.executor == "streamed":  # several chunks
        config = replace(config, max_tree_tokens_per_chunk=max(1, longest // 2))
    with waiting("comparing tree and dense"):
        difference = compare(model, batch.sequences, config=config)
    with waiting("timing both"):
        dense, tree, report = time_both(model, batch, config)
    print("\n".join(_table(difference, report, dense, tree)))
    passed = difference.agreeing_logprobs and not difference.wrong_gradients
    print("PASS" if passed else "FAIL: please report this with the output of `dta doctor`")
    return 0 if passed else 1


def time_both(model: nn.Module, batch: VerifyBatch, config: TreeConfig) -> tuple[float, float, TreeReport]:
    """(dense seconds, tree seconds, the tree's report), forward and backward; call it on a model that is warm."""
    from dta_plugin.execution.auto import run_dense, run_tree
    from dta_plugin.execution.prepared_batch import prepare_batch

    prepared = prepare_batch(model, batch.sequences, None, config)
    dense, tree = partial(run_dense, model, prepared), partial(run_tree, model, prepared, config)
    dense_seconds = min(_timed(model, dense)[0] for _ in range(_REPEATS))
    tree_runs = [_timed(model, tree) for _ in range(_REPEATS)]
    return dense_seconds, min(seconds for seconds, _ in tree_runs), tree_runs[0][1]


def _timed(model: nn.Module, forward: Callable[[], Any]) -> tuple[float, TreeReport]:
    """(seconds of a forward and a backward pass, the report)."""
    import torch

    def synchronize() -> None:
        if next(model.parameters()).is_cuda:
            torch.cuda.synchronize()

    synchronize()
    start = time.perf_counter()
    result = forward()
    torch.cat(result.logprobs).sum().backward()
    synchronize()
    seconds = time.perf_counter() - start
    model.zero_grad()
    return seconds, result.report


def _table(difference: Difference, report: TreeReport, dense: float, tree: float) -> Iterator[str]:
    chunks = f", {report.chunks} chunks" if report.executor == "streamed" else ""
    yield (
        f"{report.tree.num_sequences} sequences, {report.flat_tokens:,} -> {report.tree_tokens:,} tokens: "
        f"{report.compression_ratio:.2f}x shared, FLOP ceiling {report.ceiling:.2f}x, backend {report.backend}, "
        f"{report.executor}{chunks}"
    )
    yield ""
    gap, noise = difference.logprobs, difference.logprob_noise
    yield f"log-prob difference   {gap.mean:.1e} nats mean (rounding explains {noise.mean:.1e})"
    yield f"                      {gap.most:.1e} nats max  (rounding explains {noise.most:.1e})"
    for line, name in enumerate(_suspects(difference)):
        start = f"gradient error, of {len(difference.gradients)}" if line == 0 else ""
        error, explained = difference.gradients[name], difference.gradient_noise[name]
        yield f"{start:<22}{error:.1e} of {name} (rounding explains {explained:.1e})"
    yield f"time, both passes     dense {dense:.2f} s, tree {tree:.2f} s: {dense / tree:.2f}x"
    yield ""


def _suspects(difference: Difference) -> list[str]:
    """The parameters whose gradients differ most, measured by what rounding explains."""

    def rank(name: str) -> float:
        return difference.gradients[name] / difference.allowed_gradient(name)

    return sorted(difference.gradients, key=rank, reverse=True)[:_WORST]
