"""How much of a GRPO step is the update, and what does the whole step gain? Stock TRL against the flag.

    OMP_NUM_THREADS=1 python -m benchmarks.whole_step            # a quarter of an hour on one CPU core
    OMP_NUM_THREADS=1 python -m benchmarks.whole_step --clock cpu    # on a machine that other processes use, too
    OMP_NUM_THREADS=1 python -m benchmarks.whole_step --smoke    # seconds

Both contenders are whole trainers, `GRPOTrainer` and `TreeGRPOTrainer`, that sample with transformers' `generate` (keys
and values cached), score and update. Weights stay as they are (a learning rate of 0), so both sample the same
completions in every round. A row `prompt/completion/group` is one generation batch; with `x 4` it is used for four
updates, and its time is that of all four.

How to read the table: which share of stock's time each part takes; how many times faster the update is with the flag,
and all of it. Sampling is the same on both sides, so the whole gains what its update's share allows: with a share u of
the time and an update s times as fast, 1 / (1 - u + u / s). With vLLM shares are others; put yours into the formula.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, set_seed
from transformers.trainer_callback import PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.common.harness import CLOCKS, arguments, header, interleaved, median_ratio, parsed, table, write_json
from benchmarks.common.models import MODEL_KEYS, qwen3, random_model, twin
from benchmarks.common.words import text, tokenizer
from benchmarks.whole_step.timing import Parts, Stopwatch
from dta_plugin.adapters.trl import TreeGRPOTrainer

TOLERANCE = 1e-4
PARTS = ("sampling", "scoring", "update")
CLASSES = {"stock": GRPOTrainer, "tree": TreeGRPOTrainer}


@dataclass(frozen=True, slots=True)
class Shape:
    """A generation batch: tokens of the prompt and of each completion, completions, updates on them."""

    prompt: int
    completion: int
    group: int
    updates: int = 1

    def __str__(self) -> str:
        name = f"{self.prompt}/{self.completion}/{self.group}"
        return name if self.updates == 1 else f"{name} x {self.updates}"


SHAPES = (Shape(1024, 64, 8), Shape(1024, 64, 8, updates=4), Shape(256, 64, 8), Shape(128, 512, 8))
TINY = (Shape(32, 8, 4), Shape(16, 8, 4, updates=2))


def main() -> None:
    args = parsed(arguments(__doc__))
    config = qwen3(layers=2, hidden=64, vocab=128) if args.smoke else qwen3()
    model = random_model(config)
    rows: list[dict[str, Any]] = []
    content: dict[str, Any] = {
        **header("whole_step", args),
        "model": {key: getattr(config, key) for key in MODEL_KEYS},
        "rows": rows,
    }
    for shape in TINY if args.smoke else SHAPES:
        rows.append(_measured(model, shape, args.rounds, CLOCKS[args.clock]))
        print(f"{shape}: {rows[-1]['milliseconds']}", flush=True)
        if args.output:
            write_json(args.output, content)
    print(f"\n{result_table(rows)}")
    if bad := [row["name"] for row in rows if not row["error"] <= TOLERANCE]:
        sys.exit(f"Stock and tree disagree by more than rounding explains on {'; '.join(bad)}.")


def _trainer(cls: type[GRPOTrainer], model: PreTrainedModel, shape: Shape, folder: str) -> GRPOTrainer:
    vocab = model.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    prompt = text(torch.randint(vocab - 2, (shape.prompt,), generator=generator).tolist())
    config = GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=shape.group,
        num_generations=shape.group,
        num_iterations=shape.updates,
        max_steps=shape.updates,
        max_completion_length=shape.completion,
        generation_kwargs={"min_new_tokens": shape.completion},
        learning_rate=0.0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        report_to="none",
    )
    trainer = cls(
        model=model,
        reward_funcs=_reward,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": prompt}]),
        processing_class=tokenizer(vocab),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(ids) / len(ids) for ids in completion_ids]


def _measured(model: PreTrainedModel, shape: Shape, rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    parts: dict[str, list[Parts]] = {name: [] for name in CLASSES}
    logged: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        trainers = {name: _trainer(cls, twin(model), shape, folder) for name, cls in CLASSES.items()}
        watches = {name: Stopwatch(trainer, clock) for name, trainer in trainers.items()}

        def keep(index: int, name: str, _: Any) -> None:
            passed = watches[name].take()
            if index:
                parts[name].append(passed)
            logged[name] = [entry for entry in trainers[name].state.log_history if "loss" in entry]

        runs = {name: trainer.train for name, trainer in trainers.items()}
        interleaved(runs, rounds + 1, lambda: set_seed(0), keep, torch.device("cpu"))
    return {
        "name": str(shape),
        "milliseconds": {name: _medians(of) for name, of in parts.items()},
        "shares": {part: statistics.median(getattr(p, part) / p.step for p in parts["stock"]) for part in PARTS},
        "speed_up": {
            part: median_ratio([getattr(p, part) for p in parts["stock"]], [getattr(p, part) for p in parts["tree"]])
            for part in ("update", "step")
        },
        "error": _difference(logged["stock"], logged["tree"]),
        "seconds": {name: [asdict(p) for p in of] for name, of in parts.items()},
    }


def _medians(parts: list[Parts]) -> dict[str, int]:
    return {part: round(1e3 * statistics.median(getattr(p, part) for p in parts)) for part in PARTS}


def _difference(stock: list[dict[str, float]], tree: list[dict[str, float]]) -> float:
    """Of loss and norm of the gradient, relative; infinite where the two have not sampled the same."""
    if _sampled(stock) != _sampled(tree):
        return float("inf")
    pairs = [(a[key], b[key]) for a, b in zip(stock, tree, strict=True) for key in ("loss", "grad_norm")]
    return max(abs(a - b) / max(1.0, abs(a)) for a, b in pairs)


def _sampled(log: list[dict[str, float]]) -> list[float]:
    """The mean reward of every generation batch."""
    return [entry["reward"] for entry in log if "reward" in entry]


def result_table(rows: list[dict[str, Any]]) -> str:
    """One line per row: shares of stock's step, and what is faster by how much."""
    header = ["prompt/completion/group", *(f"{part}, stock" for part in PARTS), "update", "whole step", "max error"]
    body = [
        [
            row["name"],
            *(f"{row['shares'][part]:.0%}" for part in PARTS),
            *(f"{row['speed_up'][part]:.2f}x" for part in ("update", "step")),
            f"{row['error']:.0e}",
        ]
        for row in rows
    ]
    return table(header, body)


if __name__ == "__main__":
    main()
