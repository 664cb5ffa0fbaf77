"""Every causal family of the installed transformers, tiny and random, through the tree: exact, refused, or a bug.

    python -m tests.support.sweep --write docs/families.md      all of them, as a table (`make families`)
    python -m tests.support.sweep llama qwen3_next              some of them

A family is tried as its config class comes, and with the options that are off by default. The oracle is the untouched
model, dense, one sequence at a time; compared are log-probs, entropies and the gradient of every parameter, packed and
streamed. What `dta doctor` says of the model without weights has to be what happens. Each family has a process of its
own with a limit on time and memory.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import multiprocessing
import re
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

import dta_plugin
from dta_plugin import TreeConfig
from dta_plugin.cli.doctor_command import model_findings
from dta_plugin.errors import UnsupportedError
from dta_plugin.models.recurrent_layers import mixers
from tests.support.oracle import Result, dense, difference
from tests.support.tiny_families import NAMES, config_of, options_of, random_causal_lm
from tests.support.tree_run import make_siblings_visible, through_tree
from tests.support.trees import Sequences
from tests.support.widened import widened

EXACT, REFUSED, NOT_BUILDABLE, WRONG, CRASH = "exact", "refused", "not buildable", "wrong", "crash"
# Float32 islands within float64 models, such as norms and routers, allow no less; what is wrong is wrong by far more.
TOLERANCE = 1e-4
# What siblings that see each other have to change in a log-prob, for the comparison to mean something.
NOTICED = 1e-3
# By which the dense path may differ where casts are widened: log-probs are then cast otherwise than the oracle's.
LAST_BIT = 1e-14
STREAMED = TreeConfig(executor="streamed", max_tree_tokens_per_chunk=7)
INSTEAD = TreeConfig(on_unsupported="dense")
UNPROBED = TreeConfig(probe="off")
SECONDS, BYTES = 180.0, 12 * 2**30


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a family. note: the reason, or the largest difference. doctor: its reason; None: "works"."""

    result: str
    note: str
    model: str = ""
    doctor: str | None = None

    @property
    def is_fine(self) -> bool:
        """No bug: exact where doctor says "works"; refused with its reason, or not to be had, where it would stop."""
        if self.doctor is None:
            return self.result == EXACT
        return self.result == NOT_BUILDABLE or (self.result == REFUSED and cause(self.doctor) == cause(self.note))


def cause(reason: str) -> tuple[str, str]:
    """(why, what to do) of a reason that doctor or a run gives, without what only one of them says, and figures."""
    probed = re.search(r"differs from the model's own forward (.*?), (?:hidden states|logits|log-probs) by", reason)
    if probed is not None:
        return f"differs from its own forward {probed[1]}, as the probe finds", "run without the tree"
    for only_here in ("Prefix-tree execution is not exact here: ", "a tiny copy with random weights: "):
        reason = reason.removeprefix(only_here)
    why, _, remedy = re.sub(r"; or on_unsupported='dense'\.$", "", reason).partition("; ")
    return re.sub(r", of shape .*", "", why), remedy


@dataclass(frozen=True, slots=True)
class Row:
    """A family as it comes, and with options, where it has any."""

    family: str
    plain: Outcome
    options: Outcome | None = None
    seconds: float = field(default=0.0, compare=False)

    @property
    def outcomes(self) -> list[Outcome]:
        return [self.plain, *([] if self.options is None else [self.options])]


def forest() -> Sequences:
    """Two trees: forks at several depths, an end inside, branches of one token, paths longer than any window."""
    generator = torch.Generator().manual_seed(0)

    def run(length: int) -> list[int]:
        return torch.randint(5, 90, (length,), generator=generator).tolist()

    prompt, turn, answer = run(6), run(5), run(3)
    first = prompt + turn
    return [
        [*first, *answer],
        [*first, *answer, *run(4)],
        first,
        [*first, 90],
        [*first, 91],
        [*first, 92, *run(2)],
        [*prompt, *run(7)],
        [*prompt[:3], *run(9)],
        other := run(8),
        [*other[:4], 93],
    ]


def outcome_of(config: PretrainedConfig) -> Outcome:
    """What becomes of a model of this config."""
    try:
        doctor = doctor_says(config)
    except Exception as error:
        return Outcome(CRASH, f"doctor: {_line(error)}")
    try:
        model = random_causal_lm(config)
        expected = _expected(model)
    except Exception as error:
        return Outcome(NOT_BUILDABLE, _line(error), doctor=doctor)
    name = type(model).__name__
    try:
        with _without_islands(model):
            apart = _largest_difference(model, expected)
    except UnsupportedError as error:
        return Outcome(REFUSED, str(error), name, doctor)
    except AssertionError as error:
        return Outcome(WRONG, str(error), name, doctor)
    except Exception as error:
        return Outcome(CRASH, _line(error), name, doctor)
    precision = "" if model.dtype is torch.float64 else " in float32"
    return Outcome(EXACT, f"{apart:.0e}{precision}", name, doctor)


def _largest_difference(model: PreTrainedModel, expected: Result) -> float:
    """From the oracle, packed and streamed. Raises AssertionError where it is too large."""
    worst = 0.0
    for executor, config in (("packed", None), ("streamed", STREAMED)):
        try:
            found = difference(through_tree(model, forest(), config=config, executor=executor), expected)
        except UnsupportedError:
            assert _apart(model, expected, INSTEAD) <= LAST_BIT, "on_unsupported='dense' is not the dense path"
            raise
        assert found.worst <= TOLERANCE, f"{executor}: {found}"
        worst = max(worst, found.worst)
    with pytest.MonkeyPatch.context() as patch:
        make_siblings_visible(patch)
        assert _apart(model, expected, UNPROBED) > NOTICED, "visible siblings change nothing: the comparison is blind"
    return worst


@torch.no_grad()
def _apart(model: PreTrainedModel, expected: Result, config: TreeConfig) -> float:
    """The largest difference of a log-prob from the oracle's, without gradients."""
    actual = dta_plugin.sequence_logprobs(model, forest(), config).logprobs
    return max((a - b).abs().max().item() for a, b in zip(actual, expected.logprobs, strict=True))


def _expected(model: PreTrainedModel) -> Result:
    """The oracle's result, in float64 if the model runs in it; the model is left in that dtype."""
    try:
        with _without_islands(model.double()):
            return dense(model, forest())
    except Exception:
        return dense(model.float(), forest())


def _without_islands(model: PreTrainedModel) -> contextlib.AbstractContextManager[None]:
    """Delta rules make much of float32 in a float64 model."""
    has_states = model.dtype is torch.float64 and any(True for _ in mixers(model))
    return widened() if has_states else contextlib.nullcontext()


def doctor_says(config: PretrainedConfig) -> str | None:
    """Why `dta doctor` says that it would stop; None: "works"."""
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        *_, answer = model_findings(folder)
    return None if answer.ok else answer.note


def row_of(family: str) -> Row:
    """Try one family, in this process."""
    begin = time.perf_counter()
    try:
        configs = [config_of(family), *([config_of(family, options=True)] if options_of(family) else [])]
    except Exception as error:
        return Row(family, Outcome(NOT_BUILDABLE, _line(error), doctor="there is no config to ask about"))
    plain, options = [*map(outcome_of, configs), None][:2]
    return Row(family, plain, options, time.perf_counter() - begin)


def sweep(families: Iterable[str] = NAMES) -> Iterator[Row]:
    """Try families, each in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.tiny_families", "tests.support.tree_run"])
    for family in families:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(family, sender), daemon=True)
        process.start()
        sender.close()
        try:
            hangs = not receiver.poll(SECONDS)
            yield Row(family, Outcome(CRASH, f"no answer in {SECONDS:g} s")) if hangs else receiver.recv()
        except EOFError:
            yield Row(family, Outcome(CRASH, f"the process died, out of {BYTES / 2**30:g} GiB?"))
        finally:
            process.kill()
            process.join()


def _child(family: str, sender: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    sender.send(row_of(family))


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def main() -> None:
    from tests.support.family_table import table  # which import this module
    from tests.support.image_sweep import image_sweep

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=NAMES)
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table")
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    rows = []
    for row in sweep(args.families):
        rows.append(row)
        for outcome, variant in zip(row.outcomes, ("", " with options"), strict=False):
            doctor = "" if outcome.is_fine else f" [doctor: {outcome.doctor or 'works'}]"
            print(f"{row.family}{variant}: {outcome.result}, {outcome.note}{doctor} ({row.seconds:.1f} s)", flush=True)
    if args.write:
        images = list(image_sweep())
        args.write.write_text(table(rows, images), encoding="utf-8")
        if any(outcome.result in (WRONG, CRASH) for _, outcome in images):
            sys.exit("There are families that are wrong, or crash, with images.")
    if not all(outcome.is_fine for row in rows for outcome in row.outcomes):
        sys.exit("There are families that are wrong, crash, or contradict dta doctor.")


if __name__ == "__main__":
    main()
