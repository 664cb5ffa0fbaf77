"""Forward and backward of one SFT or DPO step through TRL's own trainers: stock, and with shared prefixes.

    OMP_NUM_THREADS=1 python -m benchmarks.offline               # about two minutes on one CPU core
    OMP_NUM_THREADS=1 python -m benchmarks.offline --clock cpu   # on a machine that other processes use, too
    OMP_NUM_THREADS=1 python -m benchmarks.offline --smoke       # seconds

Both contenders are trainers of the same class, model and batch, and run their own loss: `SFTTrainer` and
`TreeSFTTrainer`, `DPOTrainer` and `TreeDPOTrainer`. Batches are siblings on both sides, as `TreeSFTTrainer` deals them
out; the time of a stock trainer does not depend on that. DPO's reference is the same model without gradients, computed
in the step. Loss and gradients of both are compared in the same run; it fails if they differ.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from benchmarks.common.backward import gradient_error
from benchmarks.common.harness import arguments, header, interleaved, median_ratio, parsed, table, write_json
from benchmarks.common.models import MODEL_KEYS, qwen3, random_model, twin
from benchmarks.common.words import tokenizer
from benchmarks.offline.data import Batch, conversation, pairs, unrelated
from dta_plugin import PrefixTree
from dta_plugin.adapters.trl import TreeDPOTrainer, TreeSFTTrainer

TOLERANCE = 1e-4
CLASSES = {"sft": (SFTTrainer, TreeSFTTrainer), "dpo": (DPOTrainer, TreeDPOTrainer)}
Step = Callable[[], torch.Tensor]


def main() -> None:
    args = parsed(arguments(__doc__))
    config = qwen3(layers=2, hidden=64, vocab=128) if args.smoke else qwen3()
    model = random_model(config)
    rows: list[dict[str, Any]] = []
    content: dict[str, Any] = {
        **header("offline", args),
        "model": {key: getattr(config, key) for key in MODEL_KEYS},
        "rows": rows,
    }
    for batch in _batches(args.smoke, config.vocab_size):
        rows.append(_measured(model, batch, args))
        print(", ".join(f"{name} {value:.0f} ms" for name, value in rows[-1]["milliseconds"].items()), flush=True)
        if args.output:
            write_json(args.output, content)
    print(f"\n{result_table(rows)}")
    if bad := [row["name"] for row in rows if not row["error"] <= TOLERANCE]:
        sys.exit(f"Stock and tree disagree by more than rounding explains on {'; '.join(bad)}.")


def _batches(smoke: bool, vocab: int) -> list[Batch]:
    if smoke:
        return [conversation(4, 8, vocab), pairs(16, 4, 2, vocab), unrelated(8, 2, vocab)]
    return [
        conversation(9, 128, vocab),
        pairs(1024, 128, 4, vocab),
        pairs(256, 256, 1, vocab),
        unrelated(256, 8, vocab),
    ]


def _step(cls: type, model: PreTrainedModel, batch: Batch, folder: str) -> tuple[Step, list[torch.Tensor]]:
    """A step of a trainer on its one batch, and the rows that the model gets in it, without padding."""
    settings = {"sft": SFTConfig, "dpo": DPOConfig}[batch.kind]
    config = settings(
        output_dir=folder,
        per_device_train_batch_size=len(batch.rows),
        max_length=None,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
    )
    words = tokenizer(model.config.vocab_size)
    reference = {"ref_model": twin(model)} if batch.kind == "dpo" else {}
    trainer = cls(model=model, args=config, train_dataset=batch.data, processing_class=words, **reference)
    (inputs,) = list(trainer.get_train_dataloader())
    model.train()

    def step() -> torch.Tensor:
        loss = trainer.compute_loss(model, dict(inputs))
        loss.backward()
        return loss.detach()

    rows = zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)
    return step, [ids[mask] for ids, mask in rows]


def _measured(model: PreTrainedModel, batch: Batch, args: argparse.Namespace) -> dict[str, Any]:
    losses: dict[str, float] = {}
    gradients: dict[str, dict[str, torch.Tensor]] = {}
    models = {"stock": twin(model), "tree": twin(model)}
    with tempfile.TemporaryDirectory() as folder:
        made = {
            name: _step(cls, models[name], batch, folder) for name, cls in zip(models, CLASSES[batch.kind], strict=True)
        }

        def keep(index: int, name: str, loss: torch.Tensor) -> None:
            if index == 0:
                losses[name] = float(loss)
                gradients[name] = {key: p.grad.clone() for key, p in models[name].named_parameters()}

        def clear() -> None:
            for contender in models.values():
                contender.zero_grad(set_to_none=True)

        steps = {name: step for name, (step, _) in made.items()}
        clocks = interleaved(steps, args.rounds + 1, clear, keep, torch.device("cpu"))
    clocks = {clock: {name: values[1:] for name, values in by_name.items()} for clock, by_name in clocks.items()}
    seconds = clocks[args.clock]
    tree = PrefixTree.from_sequences(made["tree"][1])
    return {
        "name": batch.name,
        "flat_tokens": tree.flat_tokens,
        "tree_tokens": tree.tree_tokens,
        "milliseconds": {name: 1e3 * statistics.median(values) for name, values in seconds.items()},
        "speed_up": median_ratio(seconds["stock"], seconds["tree"]),
        "error": max(abs(losses["tree"] - losses["stock"]), gradient_error(gradients["tree"], gradients["stock"])),
        "seconds": clocks,
    }


def result_table(rows: list[dict[str, Any]]) -> str:
    """One line per batch."""
    header = ["batch", "tokens flat -> tree", "stock ms", "tree ms", "speed-up", "max error"]
    body = [
        [
            row["name"],
            f"{row['flat_tokens']} -> {row['tree_tokens']}",
            *(f"{row['milliseconds'][name]:.0f}" for name in ("stock", "tree")),
            f"{row['speed_up']:.2f}x",
            f"{row['error']:.0e}",
        ]
        for row in rows
    ]
    return table(header, body)


if __name__ == "__main__":
    main()
