"""Losses of unknown origin: with default options a subclass trains as it does without the plugin, whatever it reads.

Every kind has its negative control: what the plugin would have done to TRL's own loss changes this one.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from dta_plugin.adapters.trl import TreeGRPOConfig, TreeGRPOTrainer, TreeTrainerMixin, hooks, tokens
from dta_plugin.adapters.trl.origin import foreign_reader, unknown_loss, unknown_terms
from dta_plugin.errors import InvalidInputError, UnsupportedError
from tests.adapters.trl.support import HOOK, TOLERANCE, build, enabled, identical, moved, train, weight_difference
from tests.adapters.trl.test_pruning import flat_for_some

SHORT: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_steps": 2,
    "optim": "sgd",
    "learning_rate": 0.1,
    "trainer_options": {"reward_funcs": flat_for_some},
}


def log_probs(trainer: Any, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    seen = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    return getattr(trainer, HOOK)(model, ids, seen, inputs["completion_ids"].shape[1])[0]


class TokenMean(GRPOTrainer):
    """A mean over the tokens of the micro-batch."""

    def _compute_loss(self, model: Any, inputs: Any) -> torch.Tensor:
        logps, mask = log_probs(self, model, inputs), inputs["completion_mask"]
        gain = torch.exp(logps - logps.detach()) * inputs["advantages"][:, None]
        return -(gain * mask).sum() / mask.sum() / self.current_gradient_accumulation_steps


class Whitened(GRPOTrainer):
    """Advantages relative to the micro-batch, set on the way to TRL's loss."""

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        inputs = super()._prepare_inputs(generation_batch)
        advantages = inputs["advantages"]
        return {**inputs, "advantages": (advantages - advantages.mean()) / (advantages.std() + 1e-4)}


class ExtraTerm(GRPOTrainer):
    """A term on every token, whatever its advantage."""

    def _compute_loss(self, model: Any, inputs: Any) -> torch.Tensor:
        extra = (log_probs(self, model, inputs) * inputs["completion_mask"]).sum() / 100
        return super()._compute_loss(model, inputs) - extra


class Skipping(GRPOTrainer):
    """Takes a micro-batch or leaves it, by what is in it."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss if inputs["advantages"][0] > inputs["advantages"][-1] else loss * 0


class OwnLogProbs(GRPOTrainer):
    """Log-probs by itself, which sees what a tool answered in between: the mask says where tokens are."""

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        output = super()._generate_and_score_completions(inputs)
        output["tool_mask"] = torch.ones_like(output["completion_mask"])
        output["tool_mask"][:, 2:5] = 0
        return output

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, logits_to_keep: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor, None]:
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, -logits_to_keep - 1 : -1]
        every = logits.float().log_softmax(dim=-1)
        chosen = every.gather(2, input_ids[:, -logits_to_keep:, None])[..., 0]
        return chosen, -(every.exp() * every).sum(dim=-1), None


class Kind(NamedTuple):
    trainer: type
    forced: dict[str, str]


REGROUPED = {"regroup": "always", "merge_window": "never"}
KINDS = {
    "token mean": Kind(TokenMean, REGROUPED),
    "whitened advantages": Kind(Whitened, REGROUPED),
    "extra term": Kind(ExtraTerm, {"prune": "always"}),
    "skipped micro-batches": Kind(Skipping, REGROUPED),
    "own log-probs": Kind(OwnLogProbs, {"prune": "always"}),
}


@pytest.mark.parametrize("name", KINDS)
def test_default_options_leave_it_alone(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    kind = KINDS[name]
    stock = train(model, tmp_path, kind.trainer, GRPOConfig, **SHORT)
    with enabled(), caplog.at_level(logging.INFO, "dta_plugin"):
        run = train(model, tmp_path, kind.trainer, GRPOConfig, **SHORT)
    said = [line for line in caplog.messages if "rows and tokens stay as TRL made them" in line]
    assert len(said) == 1 and f"{kind.trainer.__name__}." in said[0] and "regroup='always'" in said[0]
    with enabled(**kind.forced):
        if kind.trainer is OwnLogProbs:  # nothing prunes for somebody else's method, so the check itself has to go
            untouched = train(model, tmp_path, kind.trainer, GRPOConfig, **SHORT)
            assert identical(untouched, stock) and not any(untouched.dta), "no metric of trees that never ran"
            for module in (tokens, hooks):
                monkeypatch.setattr(module, "foreign_reader", lambda trainer: None)
        forced = train(model, tmp_path, kind.trainer, GRPOConfig, **SHORT)
    print(
        f"{name}: apart {weight_difference(stock, run):.1e}, forced {weight_difference(stock, forced):.1e}, "
        f"moved {moved(stock):.1e}"
    )
    assert weight_difference(stock, run) < TOLERANCE < 1e-3 < moved(stock)
    assert weight_difference(stock, forced) > 50 * TOLERANCE


def test_a_micro_batch_changed_behind_the_mixin(model: str, tmp_path: Path) -> None:
    """What a base class makes of the buffer is what the loss gets, even where regrouping is forced."""
    tree = type("TreeWhitened", (TreeTrainerMixin, Whitened), {})
    stock = train(model, tmp_path, Whitened, GRPOConfig, **SHORT)
    for options in ({}, {"dta_regroup": "always", "dta_prune": "always"}):
        run = train(model, tmp_path, tree, TreeGRPOConfig, **SHORT, **options)
        assert weight_difference(stock, run) < TOLERANCE < 1e-3 < moved(stock)
        assert all(entry["dta/compression_ratio"] > 1 for entry in run.dta)


def test_log_probs_behind_the_mixin_are_not_replaced(model: str, tmp_path: Path) -> None:
    tree = type("TreeOwnLogProbs", (TreeTrainerMixin, OwnLogProbs), {})
    with pytest.raises(UnsupportedError, match=r"OwnLogProbs\._get_per.*from tests.*on_unsupported='dense'"):
        train(model, tmp_path, tree, TreeGRPOConfig, **SHORT)
    stock = train(model, tmp_path, OwnLogProbs, GRPOConfig, **SHORT)
    assert identical(train(model, tmp_path, tree, TreeGRPOConfig, dta_on_unsupported="dense", **SHORT), stock)


def passes_on(method: Callable[..., Any]) -> Callable[..., Any]:
    """A patch that claims to be what it wraps."""

    @functools.wraps(method)
    def patched(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    return patched


class Behind:
    """A mixin that TRL's `super()` reaches."""

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        return super().training_step(*args, **kwargs)  # type: ignore[misc]


def test_origins(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stock, tree = (build(model, tmp_path, each, GRPOConfig) for each in (GRPOTrainer, TreeGRPOTrainer))
    assert unknown_loss(stock) is None and unknown_terms(tree) is None and foreign_reader(tree) is None
    assert foreign_reader(stock) == f"GRPOTrainer.{HOOK} is not the plugin's"
    with enabled():
        assert unknown_terms(stock) is None and foreign_reader(stock) is None
        for name in ("get_high_entropy_mask", "get_off_policy_mask", "compute_loss", "training_step"):
            with monkeypatch.context() as patch:
                patch.setattr(GRPOTrainer, name, passes_on(getattr(GRPOTrainer, name)))
                assert f"GRPOTrainer.{name} comes from tests." in str(unknown_loss(stock))
        with monkeypatch.context() as patch:
            patch.setattr(stock, HOOK, passes_on(getattr(stock, HOOK)))
            assert f"this GRPOTrainer.{HOOK} comes from tests." in str(foreign_reader(stock))
        with monkeypatch.context() as patch:
            patch.setattr(stock, "loss_type", "of_tomorrow")
            assert "loss_type='of_tomorrow' is not among those known, grpo, " in str(unknown_loss(stock))
        stock.__class__ = type("Mixed", (GRPOTrainer, *GRPOTrainer.__bases__), {})
    tree.__class__ = type("Patched", (TreeGRPOTrainer, type("Behind", (Behind, *GRPOTrainer.__mro__[2:3]), {})), {})
    assert "training_step comes from tests." in str(unknown_loss(tree))


class PatchesLate(TrainerCallback):
    """Replaces the reader between two micro-batches of the second generation."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 1:
            setattr(self.trainer, HOOK, passes_on(getattr(self.trainer, HOOK)))


def test_a_patch_under_weights_is_an_error(model: str, tmp_path: Path) -> None:
    """A reader that appears when inputs are already weighted for the plugin's."""
    with pytest.raises(InvalidInputError, match=f"this TreeGRPOTrainer.{HOOK} comes .* before training begins"):
        train(
            model,
            tmp_path,
            TreeGRPOTrainer,
            TreeGRPOConfig,
            prepare=lambda trainer: trainer.add_callback(PatchesLate(trainer)),
            **SHORT,
        )


class RowMean(RLOOTrainer):
    def _compute_loss(self, model: Any, inputs: Any) -> torch.Tensor:
        advantages = inputs["advantages"]
        return super()._compute_loss(model, {**inputs, "advantages": advantages - advantages.mean()})


@pytest.mark.slow
def test_rloo(model: str, tmp_path: Path) -> None:
    stock = train(model, tmp_path, RowMean, RLOOConfig, **SHORT)
    with enabled():
        run = train(model, tmp_path, RowMean, RLOOConfig, **SHORT)
    with enabled(**REGROUPED):
        forced = train(model, tmp_path, RowMean, RLOOConfig, **SHORT)
    assert weight_difference(stock, run) < TOLERANCE < 1e-3 < moved(stock)
    assert weight_difference(stock, forced) > 50 * TOLERANCE
