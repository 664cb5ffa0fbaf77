"""Stock TRL against the in-place patch and against the tree trainers, on whichever TRL release can be imported:

    PYTHONPATH=<folder with another release>:. python tests/adapters/trl/smoke.py

The last line is JSON: the release, where it lies, that of transformers, and per case and way of switching on the
largest relative difference over all logged metrics and final weights. `test_versions.py` runs it for several releases.
"""

from __future__ import annotations

import gc
import json
import tempfile
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import transformers
import trl
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from dta_plugin.adapters.trl import TreeGRPOConfig, TreeGRPOTrainer, TreeRLOOConfig, TreeRLOOTrainer
from tests.adapters.trl.support import TOLERANCE, Run, difference, enabled, moved, save_model, train

LORA = {"trainer_options": {"peft_config": LoraConfig(r=4, lora_alpha=16, target_modules="all-linear")}}
# Weights are then linear in the gradients. AdamW divides by those next to zero, and their rounding becomes a step.
COMMON: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.5}
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "lora_beta": {"beta": 0.04, "num_iterations": 2, **LORA},
    "checkpointing": {"gradient_checkpointing": True},
    "checkpointing_lora": {"gradient_checkpointing": True, **LORA},
    "num_iterations_2": {"num_iterations": 2},
    "steps_per_generation_2": {"gradient_accumulation_steps": 2, "steps_per_generation": 2},
    "merged_window": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "entropy_quantile": {"top_entropy_quantile": 0.6},
    "entropy_bonus": {"entropy_coef": 0.01},
    "rloo": {"beta": 0.04},
}
# Means over micro-batches, so they depend on which rows share one; losses, gradients and weights do not.
PER_MICRO_BATCH = ("entropy",)


def main() -> None:
    warnings.filterwarnings("ignore")
    known = {f.name for f in fields(GRPOConfig)}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder)
        model = save_model(output / "model")
        names = [name for name in CASES if name != "entropy_bonus" or "entropy_coef" in known]
        gc.freeze()  # accelerate collects garbage after every training: not among what was imported
        cases = {name: compare(name, model, output) for name in names}
        gc.unfreeze()
    versions = {"trl": trl.__version__, "transformers": transformers.__version__}
    print(json.dumps(versions | {"path": trl.__path__[0], "cases": cases}))


def compare(name: str, model: str, output: Path) -> dict[str, float]:
    """Largest difference per way of switching on; raises where a comparison would say nothing."""
    options = COMMON | CASES[name]
    stock: tuple[type, type] = (GRPOTrainer, GRPOConfig)
    tree: tuple[type, type] = (TreeGRPOTrainer, TreeGRPOConfig)
    if name == "rloo":
        stock, tree = (RLOOTrainer, RLOOConfig), (TreeRLOOTrainer, TreeRLOOConfig)
    dense = train(model, output, *stock, **options)
    with enabled():
        patched = train(model, output, *stock, **options)
    ignore = PER_MICRO_BATCH if name == "steps_per_generation_2" else ()
    runs = {"patch": patched, "subclass": train(model, output, *tree, **options)}
    return {way: _difference(dense, run, ignore) for way, run in runs.items()}


def _difference(dense: Run, tree: Run, ignore: tuple[str, ...]) -> float:
    assert moved(dense) > 1000 * TOLERANCE, "training did not change the weights"
    assert not any(dense.dta), "the stock run was not stock"
    assert tree.dta and all(step["dta/dense_fallback"] == 0.0 for step in tree.dta), "the tree did not run"
    return difference(dense, tree, ignore)


if __name__ == "__main__":
    main()
