"""NEFTune's noise depends on a row's length: refused for GRPO and RLOO alike, and left to the dense path if asked.

`test_offline` has the offline trainers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback
from transformers.integrations.neftune import activate_neftune
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from dta_plugin.adapters.trl import TreeGRPOConfig, TreeGRPOTrainer, TreeRLOOConfig, TreeRLOOTrainer, hooks, scoring
from dta_plugin.errors import UnsupportedError
from tests.adapters.trl.support import identical, moved, train, weight_difference

NOISE: dict[str, Any] = {
    "neftune_noise_alpha": 5.0,
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
}
TRAINERS = {
    "grpo": (GRPOTrainer, GRPOConfig, TreeGRPOTrainer, TreeGRPOConfig),
    "rloo": (RLOOTrainer, RLOOConfig, TreeRLOOTrainer, TreeRLOOConfig),
}


@pytest.mark.parametrize("name", TRAINERS)
def test_refused_or_dense(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    trainer, config, tree, tree_config = TRAINERS[name]
    with pytest.raises(UnsupportedError, match=r"neftune_noise_alpha=5.0 adds noise.*=None; or on_unsupported"):
        train(model, tmp_path, tree, tree_config, **NOISE)
    stock = train(model, tmp_path, trainer, config, **NOISE)
    dense = train(model, tmp_path, tree, tree_config, dta_on_unsupported="dense", **NOISE)
    assert identical(dense, stock) and moved(stock) > 1e-3
    for module in (hooks, scoring):
        monkeypatch.setattr(module, "noise_obstacle", lambda trainer: None)
    unchecked = train(model, tmp_path, tree, tree_config, **NOISE)
    assert weight_difference(unchecked, stock) > 1e-3, "negative control: a tree has other noise"


class Noisy(TrainerCallback):
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        activate_neftune(kwargs["model"], 5.0)


def test_noise_on_the_model(model: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"neftune_noise_alpha=5\.0"):
        train(model, tmp_path, TreeGRPOTrainer, TreeGRPOConfig, prepare=lambda trainer: trainer.add_callback(Noisy()))
