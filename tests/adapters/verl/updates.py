"""One update by an engine, looked at before its optimizer steps: loss, metrics and gradient."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from tensordict import TensorDict
from verl.workers.config import FSDPActorConfig
from verl.workers.utils.losses import ppo_loss

from dta_plugin.config import TreeConfig
from tests.adapters.verl.support import SHAPES, Sequences, Step, actor_config, log_probs, mini_batch, nested
from tests.adapters.verl.support import response_rows as responses_of


@dataclass(frozen=True)
class Update:
    """metrics: what verl logs, and the loss. gradient: of all parameters, flat."""

    metrics: dict[str, float]
    gradient: torch.Tensor

    @property
    def numbers(self) -> torch.Tensor:
        """Metrics that are means of something over tokens, float64."""
        names = sorted(name for name in self.metrics if not name.startswith("dta/") and name != "kl_coef")
        return torch.tensor([self.metrics[name] for name in names], dtype=torch.float64)


def few() -> tuple[Sequences, list[int]]:
    """Two siblings with responses of 3 and 4 tokens."""
    prompt = [7, 11, 13, 17, 19]
    return [[*prompt, 5, 6, 8], [*prompt, 5, 9, 21, 30]], [5, 5]


SHAPES["few"] = lambda seed: few()


def sampled(engine: Any, step: Step, seed: int = 0) -> TensorDict:
    """A mini-batch with old log-probs, off by a little, and those of a reference."""
    engine.configure(TreeConfig())
    data = mini_batch(step, seed)
    rows = responses_of(data, log_probs(engine, data.copy())["log_probs"]).unbind()
    data["ref_log_prob"] = nested([row + 0.1 * torch.sin(torch.arange(len(row))) for row in rows])
    data["old_log_probs"] = nested([row + 0.3 * torch.cos(torch.arange(len(row)) * 2) for row in rows])
    return data


def without_regularisers(actor: FSDPActorConfig) -> FSDPActorConfig:
    """Neither KL nor entropy, so that a token without an advantage has no loss."""
    return replace(actor, use_kl_loss=False, entropy_coeff=0.0)


def updated(engine: Any, data: TensorDict, config: TreeConfig, actor: FSDPActorConfig | None = None) -> Update:
    """Forward and backward of one mini-batch; `data` stays as it is. actor: with KL and entropy by default."""
    engine.configure(config)
    loss_function = functools.partial(ppo_loss, config=actor or actor_config(Step()))
    given = data.copy()
    keys = set(given.keys())
    engine.module.train()  # not `train_mode`, which collects garbage for a third of a second in verl 0.8
    engine.optimizer_zero_grad()
    output = engine.forward_backward_batch(given, loss_function)
    gradient = local_gradient(engine)
    engine.optimizer_zero_grad()
    left = {key for key in set(given.keys()) - keys if key.startswith("dta")}
    assert not left, f"entries of the plugin are left: {left}"
    metrics = {name: value.aggregate() for name, value in output["metrics"].items() if hasattr(value, "aggregate")}
    return Update(metrics | {"loss": sum(output["loss"])}, gradient)


def local_gradient(engine: Any) -> torch.Tensor:
    """Of all parameters, flat: this rank's part."""
    found: list[Any] = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return torch.cat([(grad.to_local() if hasattr(grad, "to_local") else grad).flatten() for grad in found])


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()
