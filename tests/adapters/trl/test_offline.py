"""Offline trainers: training with shared prefixes equals stock training on the same batches, every metric and weight.

The stock trainer gets the order of the sibling sampler (`Ordered`), or the tree trainer keeps the stock one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.utils.data import Dataset as MapDataset
from torch.utils.data import SequentialSampler
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from dta_plugin import InvalidInputError, TreeConfig
from dta_plugin.adapters.trl import SiblingBatchesMixin, TreeDPOTrainer, TreeRewardTrainer, TreeSFTTrainer
from dta_plugin.adapters.trl.offline import _token_paths, sibling_sampler
from dta_plugin.balance import SequenceBalancingCollator, SiblingSampler
from dta_plugin.sharing.padded import PaddedBatch
from tests.adapters.trl.support import (
    LORA,
    NOT_COMPARED,
    TOLERANCE,
    TRAINING,
    VOCABULARY,
    Run,
    difference,
    moved,
    tokenizer,
)
from tests.support.models import tiny_config

ONLINE = ("num_generations", "max_completion_length")
STEPS = {name: value for name, value in TRAINING.items() if name not in ONLINE} | {"per_device_train_batch_size": 4}


class Ordered:
    """Before a stock trainer: the order of the sibling sampler, and nothing else of the plugin."""

    def _get_train_sampler(self, train_dataset: Any = None) -> SiblingSampler:
        return sibling_sampler(self, self.train_dataset if train_dataset is None else train_dataset)  # type: ignore[attr-defined]


class TreeTrainer(SiblingBatchesMixin, Trainer):
    pass


def words(count: int, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(f"w{i}" for i in torch.randint(11, VOCABULARY, (count,), generator=generator).tolist())


def trajectories() -> Dataset:
    """Conversations, a row per turn; the first turns of each two are the same."""
    rows = []
    for conversation in range(4):
        messages: list[dict[str, str]] = []
        for turn in range(4):
            seed = 10 * (conversation if turn else conversation // 2) + turn
            messages.append({"role": "user", "content": words(5, seed)})
            messages.append({"role": "assistant", "content": words(3 + turn, seed + 100)})
            rows.append({"messages": list(messages)})
    return Dataset.from_list(rows)


def tokens() -> Dataset:
    inner = tokenizer()
    texts = (" ".join(message["content"] for message in row["messages"]) for row in trajectories())
    rows = [inner(text)["input_ids"] for text in texts]
    return Dataset.from_list([{"input_ids": row, "labels": [-100] * 5 + row[5:]} for row in rows])


def pairs() -> Dataset:
    """Two pairs of each prompt."""
    return Dataset.from_list(
        [
            {"prompt": words(8 + i // 2, i // 2), "chosen": " " + words(5, 50 + i), "rejected": " " + words(4, 80 + i)}
            for i in range(16)
        ]
    )


def run(trainer_class: type, model: str, output: Path, **config: Any) -> Run:
    """Three steps with fixed seeds."""
    set_seed(11)
    peft = {"peft_config": config.pop("peft_config")} if "peft_config" in config else {}
    options: dict[str, Any]
    if issubclass(trainer_class, SFTTrainer):
        kind, options = SFTConfig, {"model": model, "train_dataset": trajectories()}
    elif issubclass(trainer_class, DPOTrainer):
        kind, options = DPOConfig, {"model": model, "train_dataset": pairs()}
    elif issubclass(trainer_class, RewardTrainer):
        kind, options = RewardConfig, {"model": model, "train_dataset": pairs()}
    else:
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        collator = SequenceBalancingCollator(DataCollatorForSeq2Seq(tokenizer(), padding="longest"))
        kind, options = TrainingArguments, {"model": loaded, "train_dataset": tokens(), "data_collator": collator}
    args = kind(**{**STEPS, "output_dir": str(output), **config})
    trainer = trainer_class(args=args, **options, **peft)
    trainer.remove_callback(PrinterCallback)
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    return Run(
        [{k: v for k, v in entry.items() if not any(part in k for part in NOT_COMPARED)} for entry in entries],
        start,
        {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad},
        [{k: v for k, v in entry.items() if k.startswith("dta/")} for entry in entries],
    )


def stock(base: type) -> type:
    return type("Ordered" + base.__name__, (Ordered, base), {})


TRAINERS = {
    "trainer": (Trainer, TreeTrainer),
    "sft": (SFTTrainer, TreeSFTTrainer),
    "dpo": (DPOTrainer, TreeDPOTrainer),
    "reward": (RewardTrainer, TreeRewardTrainer),
}
CHANGES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "non-reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "lora": {"peft_config": LORA},
    "two_epochs": {"max_steps": 6},
}
CASES = [(name, "plain") for name in TRAINERS] + [
    ("trainer", "accumulation"),
    ("sft", "reentrant"),
    ("sft", "two_epochs"),
    ("dpo", "non-reentrant"),
    ("dpo", "lora"),
    ("reward", "accumulation"),
]


@pytest.mark.parametrize("name,change", CASES)
def test_equal_to_stock(model: str, tmp_path: Path, name: str, change: str) -> None:
    assert_shares(model, tmp_path, name, **CHANGES[change])


def assert_shares(model: str, tmp_path: Path, name: str, **config: Any) -> None:
    """One of TRAINERS trains as stock does, and shares in every step."""
    base, tree_class = TRAINERS[name]
    dense = run(stock(base), model, tmp_path, **config)
    tree = run(tree_class, model, tmp_path, **config)
    worst = difference(dense, tree)
    print(f"worst difference {worst:.1e}, weights moved {moved(dense):.1e}")
    assert worst <= TOLERANCE
    assert moved(dense) > 1000 * TOLERANCE and all(entry["grad_norm"] > 0 for entry in dense.metrics)
    assert not any(dense.dta) and len(tree.dta) == len(dense.metrics)
    for entry in tree.dta:
        assert entry["dta/dense_fallback"] == 0 and entry["dta/tree_tokens"] < entry["dta/flat_tokens"]
        assert entry["dta/compression_ratio"] > 1.3


def test_kto_in_its_own_order(model: str, tmp_path: Path) -> None:
    """KTO pairs neighbours of the data set for its KL term and asks for a sequential order, which is kept."""
    from trl import KTOConfig, KTOTrainer

    def train(trainer_class: type) -> list[dict[str, float]]:
        set_seed(11)
        args = KTOConfig(**{**STEPS, "output_dir": str(tmp_path)})
        rows = [
            {"prompt": words(8, i // 4), "completion": " " + words(5, 50 + i), "label": i % 2 == 0} for i in range(16)
        ]
        trainer = trainer_class(model=model, args=args, train_dataset=Dataset.from_list(rows))
        trainer.train()
        return [entry for entry in trainer.state.log_history if "loss" in entry]

    tree_class = type("TreeKTOTrainer", (SiblingBatchesMixin, KTOTrainer), {})
    for dense, tree in zip(train(KTOTrainer), train(tree_class), strict=True):
        assert all(abs(value - tree[key]) <= TOLERANCE * max(1, abs(value)) for key, value in dense.items())
        assert tree["dta/compression_ratio"] > 1.3


@pytest.mark.usefixtures("unprobed")
def test_a_wrong_tree_is_noticed(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = run(stock(SFTTrainer), model, tmp_path)
    merge = PaddedBatch.from_arguments

    def losing_a_row(*call: Any) -> PaddedBatch:
        batch = merge(*call)
        assert isinstance(batch, PaddedBatch)
        return PaddedBatch(batch.tree, batch.index, [(0, 0), *batch.spans[1:]])

    monkeypatch.setattr(PaddedBatch, "from_arguments", losing_a_row)
    assert difference(dense, run(TreeSFTTrainer, model, tmp_path)) > 100 * TOLERANCE


def test_siblings_meet(model: str, tmp_path: Path) -> None:
    """One epoch, against the trainer's own shuffle of the same data."""
    shuffled = type("Shuffled", (TreeSFTTrainer,), {"_get_train_sampler": SFTTrainer._get_train_sampler})
    together, apart = (run(kind, model, tmp_path, max_steps=4).dta for kind in (TreeSFTTrainer, shuffled))
    assert sum(entry["dta/flat_tokens"] for entry in together) == sum(entry["dta/flat_tokens"] for entry in apart)
    tokens = [sum(entry["dta/tree_tokens"] for entry in one) for one in (together, apart)]
    assert tokens[0] < 0.95 * tokens[1], tokens


def test_another_order_is_kept(model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="dta_plugin")
    run(TreeSFTTrainer, model, tmp_path, train_sampling_strategy="sequential", max_steps=1)
    lines = [record.getMessage() for record in caplog.records]
    assert any("train_sampling_strategy='sequential' asks for another" in line for line in lines)


def test_evaluation_and_reports(model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="dta_plugin")
    args = DPOConfig(**{**STEPS, "output_dir": str(tmp_path), "max_steps": 1, "per_device_eval_batch_size": 4})
    trainer = TreeDPOTrainer(model=model, args=args, train_dataset=pairs(), eval_dataset=pairs())
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] > 0 and "eval_dta/compression_ratio" in trainer.state.log_history[-1]
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2 and lines[0].startswith("dta: 8 sequences, ") and "packed on cpu" in lines[0]
    assert lines[1].startswith("dta: in this training: 1 tree, ")


@pytest.mark.parametrize("option", [{"packing": True}, {"padding_free": True, "max_length": None}])
def test_rows_of_several_sequences_are_refused(model: str, tmp_path: Path, option: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match=f"Expected {next(iter(option))}=False"):
        run(TreeSFTTrainer, model, tmp_path, **option)


def test_an_iterable_dataset_keeps_its_order(model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="dta_plugin")
    args = SFTConfig(**{**STEPS, "output_dir": str(tmp_path), "max_steps": 1})
    trainer = TreeSFTTrainer(model=model, args=args, train_dataset=trajectories().to_iterable_dataset())
    trainer.train()
    assert trainer._dta_sharing.shared_calls == 1
    assert any("an iterable data set is read in its own order" in record.getMessage() for record in caplog.records)


def test_a_batch_of_one_says_that_nothing_is_shared(
    model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="dta_plugin")
    one = run(TreeSFTTrainer, model, tmp_path, per_device_train_batch_size=1)
    assert all(entry == {"dta/dense_fallback": 1.0} for entry in one.dta)
    assert [record.getMessage() for record in caplog.records] == [
        "dta: the model's own path: it has no second row of token ids to share anything with"
    ]


def test_options_of_a_subclass(model: str, tmp_path: Path) -> None:
    thrifty = type("Thrifty", (TreeSFTTrainer,), {"tree_config": TreeConfig(min_saving=0.9)})
    assert all(entry["dta/dense_fallback"] == 1 for entry in run(thrifty, model, tmp_path).dta)


def plain_model() -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("qwen3"))
    model.config.use_cache = False
    return model.train()


class Endless(MapDataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        assert index < 8
        return {"input_ids": [1, 2, index], "labels": [1, 2, index]}


def test_data_sets_without_index_errors() -> None:
    assert len(_token_paths(Endless())) == 8


class InOrder(Trainer):
    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


class SharedInOrder(SiblingBatchesMixin, InOrder):
    pass


def arguments(tmp_path: Path, **options: Any) -> TrainingArguments:
    common = {"use_cpu": True, "report_to": [], "save_strategy": "no", "per_device_train_batch_size": 4}
    return TrainingArguments(str(tmp_path), **(common | {"logging_steps": 4, "max_steps": 4} | options))


def test_a_trainers_own_sampler_stays(tmp_path: Path) -> None:
    trainer = SharedInOrder(plain_model(), arguments(tmp_path), train_dataset=Endless())
    assert isinstance(trainer._get_train_sampler(), SequentialSampler)


def test_noise_of_embeddings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="neftune"):
        TreeTrainer(plain_model(), arguments(tmp_path, neftune_noise_alpha=5.0), train_dataset=Endless())


def test_a_model_made_when_training_begins_shares(tmp_path: Path) -> None:
    trainer = TreeTrainer(model_init=plain_model, args=arguments(tmp_path), train_dataset=Endless())
    trainer.train()
    assert any("dta/flat_tokens" in entry for entry in trainer.state.log_history)


def test_evaluations_do_not_take_the_counts_of_training(tmp_path: Path) -> None:
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=8)
    trainer = TreeTrainer(plain_model(), args, train_dataset=Endless(), eval_dataset=Endless())
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if any("dta/flat_tokens" in key for key in entry)]
    assert [entry.get("eval_dta/flat_tokens", entry.get("dta/flat_tokens")) for entry in entries] == [24, 12, 24]
