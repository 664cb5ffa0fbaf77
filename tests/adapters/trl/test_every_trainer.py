"""One flag, every trainer: with it on, each trainer of TRL trains as stock does, and shares prefixes, or says why not.

The whole of docs/trainers.md is `long`; three trainers of it run by default.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    set_seed,
)
from trl import DPOConfig, RewardTrainer, SFTConfig, SFTTrainer

import dta_plugin
from dta_plugin.adapters.trl import every_trainer, idle
from dta_plugin.decline import Decline
from dta_plugin.errors import InvalidInputError
from dta_plugin.sharing.padded import PaddedBatch
from tests.adapters.trl.all_trainers import RECIPES, STEPS, build, texts, trainers_of_trl
from tests.adapters.trl.support import TOLERANCE, Run, difference, enabled, moved, tokenizer
from tests.adapters.trl.trainer_table import HOOK, NOT_RUN, REFUSED, SIBLINGS, Outcome, compare, lora, row, run

PAGE = Path(__file__).parents[3] / "docs" / "trainers.md"
ALL = trainers_of_trl()
SHORT = [f"trl.trainer.{name}_trainer.{name.upper()}Trainer" for name in ("sft", "dpo", "kto")]
BY_HOOK = ("GRPOTrainer", "RLOOTrainer", "GMPOTrainer")
PACKED = ("AsyncDistillationTrainer", "AsyncGRPOTrainer")
SHARING = [name for name in RECIPES if name not in BY_HOOK + PACKED]
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def check(outcome: Outcome) -> None:
    assert outcome.worst <= TOLERANCE
    assert moved(outcome.stock) > 100 * TOLERANCE and not any(outcome.stock.dta)
    if outcome.how == HOOK:
        assert all(entry["dta/dense_fallback"] == 0 for entry in outcome.flagged.dta)
    elif outcome.how == REFUSED:
        assert outcome.reason and not any(shared for _, shared in outcome.models)
    else:
        assert outcome.models and all(shared > 0 for _, shared in outcome.models)
        assert max(entry.get("dta/compression_ratio", 0) for entry in outcome.flagged.dta) > 1.05


@pytest.mark.parametrize("name", SHORT)
def test_equal_to_stock(name: str, model: str, tmp_path: Path) -> None:
    outcome = compare(ALL[name], model, tmp_path)
    check(outcome)
    assert all(entry["dta/dense_fallback"] == 0 for entry in outcome.flagged.dta)


@pytest.mark.long
@pytest.mark.skipif(not version("trl").startswith("1.16."), reason="the page is of TRL 1.16")
def test_every_trainer_is_in_the_table(model: str, tmp_path: Path) -> None:
    lines = []
    for name, trainer_class in ALL.items():
        if trainer_class.__name__ in NOT_RUN:
            lines.append(row(name, None, None))
            continue
        outcome, adapted = compare(trainer_class, model, tmp_path), lora(trainer_class, model, tmp_path)
        for each in (outcome, adapted):
            if each is not None:
                print(f"{name}: {each.how}, worst difference {each.worst:.1e}")
                check(each)
        lines.append(row(name, outcome, adapted))
    listed = [line for line in PAGE.read_text().splitlines() if line.startswith("| `trl.")]
    assert list(map(without_figures, listed)) == list(map(without_figures, lines))


def without_figures(line: str) -> str:
    return "|".join(line.split("|")[:4])


@pytest.mark.parametrize("name", SHORT)
def test_lora_equals_stock(name: str, model: str, tmp_path: Path) -> None:
    outcome = lora(ALL[name], model, tmp_path)
    assert outcome is not None
    check(outcome)
    assert all("lora_" in weight for weight in outcome.stock.weights)


def test_every_trainer_has_a_recipe_and_a_line() -> None:
    page = PAGE.read_text()
    for name, trainer_class in ALL.items():
        assert trainer_class.__name__ in RECIPES.keys() | NOT_RUN.keys(), name
        assert f"`{trainer_class.__name__}`" in page


@pytest.mark.usefixtures("unprobed")
@pytest.mark.parametrize("names", [["KTOTrainer"], pytest.param(SHARING, marks=pytest.mark.long)], ids=["short", "all"])
def test_a_wrong_tree_is_noticed(names: list[str], model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merge = PaddedBatch.from_arguments

    def losing_a_row(*call: Any) -> PaddedBatch | Decline:
        batch = merge(*call)
        if isinstance(batch, Decline):
            return batch
        return PaddedBatch(batch.tree, batch.index, [(0, 0), *batch.spans[1:]])

    monkeypatch.setattr(PaddedBatch, "from_arguments", losing_a_row)
    for trainer_class in {value.__name__: value for value in ALL.values() if value.__name__ in names}.values():
        assert compare(trainer_class, model, tmp_path).worst > 100 * TOLERANCE, trainer_class


@pytest.mark.long
@pytest.mark.parametrize("name", ["CPOTrainer", "ORPOTrainer"])
def test_metrics_over_padding(name: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer_class = next(value for value in ALL.values() if value.__name__ == name)
    monkeypatch.setitem(RECIPES, name, RECIPES["DPOTrainer"])  # rows of unequal lengths
    outcome = compare(trainer_class, model, tmp_path)
    assert outcome.worst <= TOLERANCE and "which may read what the model computes there" in outcome.reason
    monkeypatch.setattr(every_trainer, "_masked", lambda: every_trainer._OF_ANY_RELEASE)
    assert compare(trainer_class, model, tmp_path).worst > 100 * TOLERANCE


class OwnLossTrainer(SFTTrainer):
    """Reads the logits of padding: their mean is in the loss."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return model(**inputs).logits.square().mean()


def test_an_unknown_loss_may_read_padding(
    model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RECIPES, "OwnLossTrainer", RECIPES["SFTTrainer"])
    caplog.set_level("INFO", logger="dta_plugin")
    outcome = compare(OwnLossTrainer, model, tmp_path)
    assert outcome.worst <= TOLERANCE and outcome.how != SIBLINGS
    assert any("OwnLossTrainer.compute_loss comes from tests" in line for line in caplog.messages)
    monkeypatch.setattr(every_trainer, "_masked", lambda: (*every_trainer._OF_ANY_RELEASE, "tests."))
    assert compare(OwnLossTrainer, model, tmp_path).worst > 100 * TOLERANCE, "padding has no hidden states in a tree"


class MeanOverPadding(Qwen3ForCausalLM):
    """A head of its own, whose loss is the mean over all positions."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> dict[str, torch.Tensor]:  # type: ignore[override]
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        return {"loss": hidden.square().mean()}


def test_an_unknown_head_may_read_padding(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = tokenizer()
    rows = [{"input_ids": tokens(text)["input_ids"]} for text in texts()["text"]]

    def trained(flag: bool) -> Run:
        set_seed(11)
        args = TrainingArguments(**STEPS | {"output_dir": str(tmp_path)})
        collator = DataCollatorWithPadding(tokens)
        head = MeanOverPadding.from_pretrained(model, dtype=torch.float32)
        trainer = Trainer(head, args, collator, train_dataset=rows)
        with enabled() if flag else nullcontext():
            return run(trainer)

    stock = trained(flag=False)
    assert difference(stock, trained(flag=True)) <= TOLERANCE
    monkeypatch.setattr(every_trainer, "_padding_reader", lambda *_: None)
    assert difference(stock, trained(flag=True)) > 100 * TOLERANCE


@pytest.mark.parametrize("option", ["packing", "padding_free"])
def test_a_setting_that_keeps_prefixes_apart(
    option: str, model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="dta_plugin")
    with enabled():
        trainer = build(
            SFTTrainer, model, tmp_path, **{option: True, "max_length": 32 if option == "packing" else None}
        )
        trainer.train()
    said = [line for line in caplog.messages if "use_dta" in line]
    assert len(said) == 1 and f"use_dta does nothing for this SFTTrainer: {option}=True" in said[0]


def test_options_that_say_nothing_here(model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="dta_plugin")
    with enabled(prune="always", regroup="never", min_saving=0.9):
        trainer = build(SFTTrainer, model, tmp_path)
        trainer.train()
    assert len([line for line in caplog.messages if "batches are made of siblings" in line]) == 1
    assert any("prune='always' does nothing in SFTTrainer" in line for line in caplog.messages)
    assert not any("regroup" in line for line in caplog.messages)  # which is what happens anyway
    assert any("use_dta did nothing" in line and "min_saving 90%" in line for line in caplog.messages)


def test_nothing_is_left_after_disable(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idle, "_is_sticky", False)  # a config of another test may have asked
    dta_plugin.disable()
    own = Trainer.train
    with enabled():
        trainer: Any = build(RewardTrainer, model, tmp_path)
        assert Trainer.train is not own
        trainer.train()
    assert "margin" in trainer.train_dataset.column_names and trainer._dta_sharing.shared_calls == 2
    assert type(trainer) is RewardTrainer and Trainer.train is own
    assert not any(module._forward_pre_hooks for module in trainer.model.modules())


def collate(tokens: Any) -> Any:
    """Text when it is read, token ids when it is collated."""

    def collated(examples: list[dict[str, str]]) -> dict[str, torch.Tensor]:
        batch = tokens([example["text"] for example in examples], return_tensors="pt", padding=True)
        return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}

    return collated


def with_transform(data: Dataset, tokens: Any) -> Dataset:
    data.set_transform(lambda rows: {"input_ids": tokens(rows["text"])["input_ids"]})
    return data


UNSORTED: dict[str, Any] = {
    "text": lambda data, tokens: {"train_dataset": data, "data_collator": collate(tokens)},
    "transform": lambda data, tokens: {"train_dataset": with_transform(data, tokens)},
    "iterable": lambda data, tokens: {"train_dataset": data.to_iterable_dataset()},
}


def unsorted(kind: str, model: str, output: Path) -> Any:
    options = STEPS | {"remove_unused_columns": False, "output_dir": str(output)}
    if kind != "iterable":
        options["dataset_kwargs"] = {"skip_prepare_dataset": True}
    set_seed(11)
    data = UNSORTED[kind](texts(), tokenizer())
    return SFTTrainer(model, SFTConfig(**options), processing_class=tokenizer(), **data)


@pytest.mark.parametrize("kind", UNSORTED)
def test_data_that_cannot_be_sorted_keeps_its_order(
    kind: str, model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="dta_plugin")
    stock = run(unsorted(kind, model, tmp_path))
    trainer = unsorted(kind, model, tmp_path)
    with enabled():
        flagged = run(trainer)
    assert not any("batches are made of siblings" in line for line in caplog.messages)
    assert Outcome(SIBLINGS, "", [], stock, flagged).worst <= TOLERANCE
    assert trainer._dta_sharing.shared_calls == 2
    assert len([line for line in caplog.messages if "batches are the trainer's own" in line]) == 1


OTHER_MODELS: dict[str, tuple[Callable[[], torch.nn.Module], str]] = {
    "no model of transformers": (lambda: torch.nn.Linear(2, 2), "its model, a Linear, is none of transformers"),
    "an encoder": (lambda: BertForSequenceClassification(BertConfig(**SIZES, vocab_size=40)), "no rotary positions"),
    "images": (lambda: ViTForImageClassification(ViTConfig(**SIZES, image_size=8, patch_size=4)), "ViTForImage"),
    "sounds": (lambda: Wav2Vec2ForCTC(Wav2Vec2Config(**SIZES, num_conv_pos_embedding_groups=2)), "Wav2Vec2ForCTC"),
}


@pytest.mark.parametrize("kind", OTHER_MODELS)
def test_other_models_are_left_alone(kind: str, tmp_path: Path) -> None:
    make, reason = OTHER_MODELS[kind]
    trainer = Trainer(make(), TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]), train_dataset=texts())
    assert reason in str(every_trainer.sharing_obstacle(trainer))


@pytest.mark.parametrize(
    ("config", "stay"),
    [
        (DPOConfig("x", use_cpu=True), False),
        (SFTConfig("x", use_cpu=True), False),
        (DPOConfig("x", use_cpu=True, loss_type=["ipo"]), False),
        (DPOConfig("x", use_cpu=True, loss_type=["aot"]), True),
        (DPOConfig("x", use_cpu=True, loss_type=["sigmoid", "aot_unpaired"]), True),
        (DPOConfig("x", use_cpu=True, loss_type=["mine"]), True),
    ],
    ids=["dpo", "sft", "ipo", "aot", "one of two", "unknown"],
)
def test_batches_stay_where_the_loss_may_compare_their_rows(config: Any, stay: bool) -> None:
    assert every_trainer._reads_batches(SimpleNamespace(args=config)) == stay  # type: ignore[arg-type]


def test_options_of_its_own_that_do_nothing(model: str, tmp_path: Path) -> None:
    trainer = build(SFTTrainer, model, tmp_path)
    vars(trainer.args).update(use_dta=True, dta_prune="always")
    with enabled(), pytest.raises(InvalidInputError, match=r"^dta_prune='always' does nothing in SFTTrainer"):
        trainer.train()
