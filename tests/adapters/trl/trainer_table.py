"""What the flag does to each trainer of TRL, from two trainings of each: docs/trainers.md.

python -m tests.adapters.trl.trainer_table
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import trl
from peft import LoraConfig
from transformers import Trainer, TrainerCallback

from dta_plugin.adapters.trl import SiblingBatchesMixin
from dta_plugin.adapters.trl.every_trainer import by_hook
from dta_plugin.adapters.trl.offline import sibling_sampler
from tests.adapters.trl.all_trainers import build, trainers_of_trl
from tests.adapters.trl.support import NOT_COMPARED, TOLERANCE, Run, difference, enabled, save_model, trainable

HOOK, SIBLINGS, CALLS, EQUAL_LENGTHS, REFUSED = (
    "tree, by the log-prob hook",
    "tree, batches of siblings",
    "`share_prefixes`",
    "`share_prefixes`, where no row of a call is padded",
    "refused",
)
# Stock needs a GPU; it has tests of its own against the model alone.
NOT_RUN = {"AsyncGRPOTrainer": "tree, TRL's own rows on any device (`tests/adapters/trl/test_async_grpo.py`)"}
TAKES_NO_ADAPTER = ("A2POTrainer",)
# Both factors random from the start: a new adapter does nothing, and its reference would be the model itself.
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)

_HEAD = """# One flag, every trainer

What `use_dta` does to every trainer class of TRL {version}. Each line is from two trainings of a tiny model, stock and
with the flag: final weights and every logged metric agree to 1e-5 (`tests/adapters/trl/test_every_trainer.py`;
`python -m tests.adapters.trl.trainer_table` writes this page). Shared: flat over tree tokens of that training, and how
many models shared prefixes, references and teachers included; then the same of two trainings with a LoRA `peft_config`,
whose reference is the model without its adapter. SFT, DPO and KTO are tried on two ranks as well, under DDP and FSDP2
(`tests/adapters/trl/test_trainers_on_ranks.py`).

- **tree, by the log-prob hook**: siblings meet in a micro-batch or window, log-probs come from the tree.
- **tree, batches of siblings**: what TreeSFTTrainer and its like do. Data that cannot be sorted keeps its order.
- **`share_prefixes`**: batches stay as they are, and what meets in a model call runs once.
- **where no row of a call is padded**: a metric of this trainer averages over padding (`logits/chosen`,
  `objective/kl`), where a tree has no hidden states. Calls with padded rows take the model's own path.
- **refused**: the model's own path, and one line that gives the reason.

A trainer of your own is served by its methods: with TRL's loss as above; with a loss of its own, or with functions for
metrics, as the fourth. `packing`, `padding_free`, `torch_compile` and NEFTune are refused, with the reason in one line
before the training. A model that cannot run as a tree after all, which two short rows show before the first step, takes
its own path from there on, on all ranks. What reward functions and callbacks call is stock.

| package | trainer | with the flag | shared, models | with LoRA |
|---|---|---|---|---|"""


@dataclass
class Outcome:
    """how: one of the kinds above. reason: of one that is refused. models: calls and shared calls of each."""

    how: str
    reason: str
    models: list[tuple[int, int]]
    stock: Run
    flagged: Run

    @property
    def worst(self) -> float:
        return difference(self.stock, self.flagged)


class _Mixin(TrainerCallback):
    """Whether the trainer's batches are made of siblings while it trains."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.is_of_siblings = trainer, False

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.is_of_siblings = isinstance(self.trainer, SiblingBatchesMixin)


def compare(
    trainer_class: type[Trainer], model: str, output: Path, dta: dict[str, Any] | None = None, **options: Any
) -> Outcome:
    """Train with the flag and stock, with the same seeds and batches. dta: options of the first."""
    with enabled(**(dta or {})):
        trainer = build(trainer_class, model, output, **options)
        mixin = _Mixin(trainer)
        trainer.add_callback(mixin)
        flagged = run(trainer)
    stock: Any = build(trainer_class, model, output, **options)
    if mixin.is_of_siblings:
        stock._get_train_sampler = lambda dataset=None: sibling_sampler(stock, stock.train_dataset)
    how, reason = _kind(trainer, mixin.is_of_siblings)
    models = [(sharing.calls, sharing.shared_calls) for sharing in vars(trainer).get("_dta_begun", [])]
    return Outcome(how, reason, models, run(stock), flagged)


def _kind(trainer: Trainer, is_of_siblings: bool) -> tuple[str, str]:
    """How a trained trainer ran, and why where it was refused."""
    if by_hook(trainer):
        return HOOK, ""
    sharing = vars(trainer)["_dta_sharing"]
    if not sharing.shared_calls:
        return REFUSED, sharing.reason
    if is_of_siblings:
        return SIBLINGS, ""
    return (CALLS if sharing.padding_reader is None else EQUAL_LENGTHS), ""


def run(trainer: Trainer) -> Run:
    """Train; metrics and weights."""
    start = trainable(trainer.model)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    return Run(
        [{k: v for k, v in entry.items() if not any(part in k for part in NOT_COMPARED)} for entry in entries],
        start,
        trainable(trainer.model),
        [{k: v for k, v in entry.items() if k.startswith("dta/")} for entry in entries],
    )


def lora(trainer_class: type[Trainer], model: str, output: Path) -> Outcome | None:
    """The same as `compare`, of a model with adapters; None for a trainer without a `peft_config`."""
    if trainer_class.__name__ in TAKES_NO_ADAPTER:
        return None
    return compare(trainer_class, model, output, peft_config=LORA)


def row(name: str, outcome: Outcome | None, adapted: Outcome | None) -> str:
    """A trainer's line of the page. outcome: None where it cannot be run. adapted: with LoRA, None without."""
    package, _, short = name.removeprefix("trl.").rpartition(".")
    folder = ".".join(part for part in package.split(".") if not part.endswith("_trainer"))
    if outcome is None:
        return f"| `trl.{folder}` | `{short}` | {NOT_RUN[short]} | | |"
    how = f"{outcome.how}: {outcome.reason}" if outcome.reason else outcome.how
    without = "takes no `peft_config`" if adapted is None else _shared(adapted)
    return f"| `trl.{folder}` | `{short}` | {how} | {_shared(outcome)} | {without} |"


def _shared(outcome: Outcome) -> str:
    ratios = [entry["dta/compression_ratio"] for entry in outcome.flagged.dta if "dta/compression_ratio" in entry]
    return f"{sum(ratios) / len(ratios):.1f}x, {max(1, len(outcome.models))}" if ratios else ""


def page(rows: list[str]) -> str:
    return "\n".join([_HEAD.format(version=trl.__version__), *rows, ""])


def main() -> None:
    logging.getLogger("dta_plugin").setLevel(logging.ERROR)
    rows = []
    with TemporaryDirectory() as folder:
        model = save_model(Path(folder) / "model")
        for name, trainer_class in trainers_of_trl().items():
            output = Path(folder) / "output"
            if trainer_class.__name__ in NOT_RUN:
                rows.append(row(name, None, None))
                continue
            outcomes = compare(trainer_class, model, output), lora(trainer_class, model, output)
            assert all(outcome is None or outcome.worst <= TOLERANCE for outcome in outcomes), name
            rows.append(row(name, *outcomes))
    Path("docs/trainers.md").write_text(page(rows))


if __name__ == "__main__":
    main()
