"""What a user's own code gets from a model that shares prefixes while it trains: what it gets from stock."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, DynamicCache, Trainer, TrainerCallback, TrainingArguments
from trl import KTOTrainer, SFTTrainer
from trl.experimental.online_dpo import OnlineDPOTrainer
from trl.experimental.sdpo import SDPOTrainer

from dta_plugin.adapters.trl.shared_prefixes import SharedPrefixesMixin
from dta_plugin.sharing.decoder_hooks import handle_of
from tests.adapters.trl.all_trainers import RECIPES, build
from tests.adapters.trl.support import TOLERANCE, difference, enabled
from tests.adapters.trl.support import reward as even_words
from tests.adapters.trl.trainer_table import run
from tests.support.models import tiny_model

ROWS = torch.tensor([[5, 6, 7], [5, 6, 8]])
Decoder = Callable[[Any], list[float]]


def growing_rows(model: Any) -> list[float]:
    ids = ROWS
    for _ in range(4):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids.flatten().tolist()


def padded_rows(model: Any) -> list[float]:
    """What the model predicts at padding, too."""
    logits = model(input_ids=ROWS, attention_mask=torch.tensor([[1, 1, 1], [1, 1, 0]])).logits
    return [*logits[:, -1].flatten().tolist(), logits.square().mean().item()]


def own_cache(model: Any) -> list[float]:
    cache, ids, found = DynamicCache(config=model.config), ROWS, []
    for _ in range(4):
        ids = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        found += ids.flatten().tolist()
    return [*found, cache.get_seq_length()]


def unasked_cache(model: Any) -> list[float]:
    """That of the config's `use_cache`."""
    past, ids, found = None, ROWS, []
    model.config.use_cache = True
    for _ in range(4):
        output = model(input_ids=ids, past_key_values=past)
        ids, past = output.logits[:, -1:].argmax(-1), output.past_key_values
        found += ids.flatten().tolist()
    model.config.use_cache = False
    return found


def generate(model: Any) -> list[float]:
    ids = model.generate(
        input_ids=ROWS, attention_mask=torch.ones_like(ROWS), use_cache=False, do_sample=False, max_new_tokens=4
    )
    return ids.flatten().tolist()


class Asks:
    """Decodes with the model that is trained, in every way, in its mode and in evaluation mode."""

    ways: tuple[Decoder, ...] = (growing_rows, padded_rows, own_cache, unasked_cache, generate)

    def __init__(self) -> None:
        self.model: Any = None
        self.found: list[list[float]] = []

    def __call__(self) -> None:
        mode = self.model.training
        with torch.no_grad():
            for way in self.ways:
                self.found.append(way(self.model))
                self.model.eval()
                self.found.append(way(self.model))
                self.model.train(mode)

    def reward(self, completions: list[Any], **_: Any) -> list[float]:
        self()
        return even_words(completions)


class Callback(TrainerCallback):
    def __init__(self, asks: Asks) -> None:
        self.on_step_begin = self.on_step_end = lambda *_, **__: asks()  # type: ignore[method-assign, assignment]


class AskingTrainer(SFTTrainer):
    """Asks within its loss."""

    asks: Asks

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self.asks()
        return super().compute_loss(*args, **kwargs)


def asked(place: str, flag: bool, model: str, output: Path) -> tuple[Asks, Any]:
    """A training in which something of a user's asks the model."""
    asks = Asks()
    if place == "loss":
        AskingTrainer.asks = asks
        trainer = build(AskingTrainer, model, output)
    elif place == "callback":
        trainer = build(KTOTrainer, model, output)
        trainer.add_callback(Callback(asks))
    else:
        trainer_class = SDPOTrainer if place == "reward" else OnlineDPOTrainer
        trainer = build(trainer_class, model, output, reward_funcs=asks.reward)
    asks.model = trainer.model
    with enabled() if flag else nullcontext():
        trainer.train()
    return asks, trainer


def apart(stock: Asks, flagged: Asks) -> float:
    pairs = zip(stock.found, flagged.found, strict=True)
    return max((torch.tensor(a) - torch.tensor(b)).abs().max().item() for a, b in pairs)


@pytest.mark.parametrize("place", ["reward", "reward and padding", "callback", "loss"])
def test_decoding_by_hand(place: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECIPES, "AskingTrainer", RECIPES["SFTTrainer"])
    stock, _ = asked(place, False, model, tmp_path)
    flagged, trainer = asked(place, True, model, tmp_path)
    assert apart(stock, flagged) <= TOLERANCE
    assert len(stock.found) >= 20 and stock.found[:10] != stock.found[-10:], "the model has learned"
    if place != "loss":  # whose rows are padded
        assert trainer._dta_sharing.shared_calls > 0


@pytest.mark.parametrize("way", [padded_rows, unasked_cache])
def test_decoding_by_hand_within_sharing_is_noticed(
    way: Decoder, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Asks, "ways", (way,))
    stock, _ = asked("reward", False, model, tmp_path)
    monkeypatch.setattr(SharedPrefixesMixin, "_dta_functions_of_others", nullcontext)
    if way is padded_rows:
        assert apart(stock, asked("reward", True, model, tmp_path)[0]) > 100 * TOLERANCE
    else:
        with pytest.raises(AssertionError, match="different"):
            assert stock.found == asked("reward", True, model, tmp_path)[0].found, "different"


class Handle(TrainerCallback):
    """That of a model while the training begins."""

    def __init__(self, model: Any) -> None:
        self.model, self.sharing = model, None

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.sharing = handle_of(self.model.model)  # type: ignore[assignment]


def test_reward_models_share(model: str, tmp_path: Path) -> None:
    runs = []
    for flag in (False, True):
        torch.manual_seed(3)
        scorer = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32)
        trainer = build(SDPOTrainer, model, tmp_path, reward_funcs=[scorer])
        handle: Any = Handle(scorer)
        trainer.add_callback(handle)
        with enabled() if flag else nullcontext():
            runs.append(run(trainer))
    assert difference(*runs) <= TOLERANCE
    assert handle.sharing.calls == handle.sharing.shared_calls > 0


class Decoding(TrainerCallback):
    """Decodes as a user's own logging does, where the config's `use_cache` is on for the whole training."""

    def __init__(self) -> None:
        self.tokens: list[list[float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"].eval()
        with torch.no_grad():
            self.tokens.append(unasked_cache(model))
        model.config.use_cache = True
        model.train()


class CountingTrainer(Trainer):
    """Has methods of its own under names that a mixin might take, and that TRL's trainers have."""

    @staticmethod
    def _generate(inputs: dict[str, Any]) -> list[str]:
        return list(inputs)

    def _count(self, inputs: dict[str, Any]) -> int:
        return len(inputs["input_ids"])

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        assert self._count(inputs) and "input_ids" in self._generate(inputs)
        return super().training_step(model, inputs, *args, **kwargs)


def test_what_others_call_within_a_training_is_stock(tmp_path: Path) -> None:
    rows = [{"input_ids": [1, 2, 3, 4 + i], "labels": [1, 2, 3, 4 + i]} for i in range(4)]
    tokens, shared = [], []
    for flag in (False, True):
        model, callback = tiny_model("qwen3"), Decoding()
        model.config.use_cache = True
        args = TrainingArguments(str(tmp_path), per_device_train_batch_size=4, max_steps=2, logging_steps=1)
        trainer = CountingTrainer(model, args, train_dataset=rows, callbacks=[callback])
        with enabled() if flag else nullcontext():
            trainer.train()
        tokens.append(callback.tokens)
        shared.append(any("dta/tree_tokens" in entry for entry in trainer.state.log_history))
    assert tokens[0] == tokens[1] and shared == [False, True]
