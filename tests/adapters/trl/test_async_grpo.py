"""AsyncGRPO on a CPU: real trainers on recorded rollouts, against the model alone, one sample at a time."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer, async_grpo_trainer, packing

import dta_plugin
from dta_plugin import TreeConfig
from dta_plugin.adapters.trl.async_grpo import TreeAsyncGRPOConfig, TreeAsyncGRPOTrainer
from dta_plugin.adapters.trl.folded_rows import FoldedRow
from dta_plugin.errors import InvalidInputError, UnsupportedError
from dta_plugin.tree.trie import PrefixTree
from tests.adapters.trl.async_rollouts import (
    BATCH,
    batch_of,
    build,
    dense_loss,
    dense_model,
    dense_training,
    plain_kernel,
    samples,
    save,
)
from tests.adapters.trl.support import LORA, TOLERANCE, VOCABULARY, enabled
from tests.support.models import EAGER_EXPERTS, tiny_config

STOCK = (AsyncGRPOTrainer, AsyncGRPOConfig)
TREE = (TreeAsyncGRPOTrainer, TreeAsyncGRPOConfig)
# All positions; a window; windows and soft-caps; windows and sinks.
FAMILIES = ("qwen3", "mistral", "gemma2", "gpt_oss")
# A loss of experts is not one of samples; float64 needs their plain version.
OF_FAMILY = {"gpt_oss": {"router_aux_loss_coef": 0.0, "model_init_kwargs": {**EAGER_EXPERTS}}}
STEPS = 3


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Per family, a model on disk."""
    folder = tmp_path_factory.mktemp("async")
    return {name: save(tiny_config(name, vocab_size=VOCABULARY), folder / name) for name in (*FAMILIES, "qwen3_moe")}


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's own path where there is no GPU: its kernel in torch, and no question for the GPU's name."""
    monkeypatch.setattr(packing, "_flash_attn", plain_kernel)
    monkeypatch.setattr(async_grpo_trainer, "get_peak_flops_per_device", lambda accelerator, dtype: None)


def loss_of(trainer: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    trainer.current_gradient_accumulation_steps = 1  # which its loop sets
    trainer.model.train()
    return trainer.compute_loss(trainer.model, batch)


def test_draws_its_first_tree(models: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "tree.svg"
    with enabled(picture=str(file)):
        trainer = build(models["qwen3"], tmp_path, samples(2), *STOCK)
        loss_of(trainer, batch_of(trainer))
    (said,) = re.findall(r"first tree: (\d+) sequences, \d+ tokens, \d+ computed", file.read_text())
    assert int(said) > 1


def apart(a: nn.Module, b: nn.Module, what: str = "data") -> float:
    """Largest relative difference of any trained parameter's data or grad."""
    others = dict(b.named_parameters())
    pairs = [(getattr(p, what), getattr(others[name], what)) for name, p in a.named_parameters() if p.requires_grad]
    assert len(pairs) == sum(p.requires_grad for p in others.values())
    return max(((x - y).norm() / y.norm().clamp(min=1e-6)).item() for x, y in pairs)


@pytest.mark.parametrize("options", [{}, {"max_tree_tokens_per_chunk": 20}], ids=["packed", "streamed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients(models: dict[str, str], tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    rollouts = samples(2)
    with enabled(**options):
        trainer = build(models[family], tmp_path, rollouts, *STOCK, **OF_FAMILY.get(family, {}))
        trainer.model.double()
        batch = batch_of(trainer)
        loss = loss_of(trainer, batch)
        loss.backward()
    dense = dense_model(models[family]).double()
    expected = dense_loss(dense, rollouts[:BATCH])
    expected.backward()
    assert abs(loss.item() - expected.item()) <= TOLERANCE
    assert apart(trainer.model, dense, "grad") <= TOLERANCE
    assert (trainer._metrics["train"]["dta/chunks"][0] > 1) == bool(options)
    assert trainer._metrics["train"]["dta/compression_ratio"][0] > 2
    # The row without its tree: siblings see each other.
    trainer.model.set_attn_implementation("eager")
    if family != "gpt_oss":
        trainer.model.zero_grad()
        loss_of(trainer, batch).backward()
        assert apart(trainer.model, dense, "grad") > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("family", "accumulated", "options"),
    [
        ("qwen3", 1, {}),
        ("qwen3", 2, {"gradient_checkpointing": True}),
        ("gemma2", 1, {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}),
        ("gpt_oss", 2, {"gradient_checkpointing": True, "router_aux_loss_coef": 0.0}),
        ("qwen3", 1, {"peft_config": LORA}),
    ],
    ids=["plain", "accumulated", "softcaps", "sinks", "lora"],
)
def test_training(
    models: dict[str, str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    family: str,
    accumulated: int,
    options: dict[str, Any],
) -> None:
    """Several steps with the flag leave the weights that a loop without TRL leaves."""
    rollouts = samples(STEPS * accumulated + 2)
    dense: nn.Module = dense_model(models[family])
    with enabled():
        run = {"max_steps": STEPS, "gradient_accumulation_steps": accumulated, **options}
        trainer = build(models[family], tmp_path, rollouts, *STOCK, **run)
        if isinstance(options.get("peft_config"), LoraConfig):
            dense = get_peft_model(dense, LORA)
            start = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
            dense.load_state_dict(start, strict=False)
        before = [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]
        trainer.train()
    assert "did nothing" not in caplog.text
    losses = dense_training(dense, rollouts, STEPS, accumulated)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert apart(trainer.model, dense) <= TOLERANCE
    assert all(abs(entry["loss"] - loss) <= TOLERANCE for entry, loss in zip(logged, losses, strict=True))
    after = [p for p in trainer.model.parameters() if p.requires_grad]
    assert max((x - y).norm() / y.norm() for x, y in zip(after, before, strict=True)) > 0.01
    assert all(entry["dta/dense_fallback"] == 0 for entry in logged)
    assert len(trainer.weight_transfer.sent) == STEPS + 1 and min(map(len, trainer.weight_transfer.sent)) > 10


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "qwen3_moe"])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_equal_to_stock(models: dict[str, str], tmp_path: Path, family: str, accumulated: int) -> None:
    """Weights and all metrics, the router loss too, with a plain version of TRL's kernel."""
    rollouts = samples(STEPS * accumulated + 2)
    run: dict[str, Any] = {"max_steps": STEPS, "gradient_accumulation_steps": accumulated}
    if family == "qwen3_moe":
        run["router_aux_loss_coef"] = 1.0
    stock = build(models[family], tmp_path, rollouts, *STOCK, **run)
    stock.train()
    tree = build(models[family], tmp_path, rollouts, *TREE, **run)
    tree.train()
    assert apart(stock.model, tree.model) <= TOLERANCE
    for own, ours in zip(stock.state.log_history[:STEPS], tree.state.log_history[:STEPS], strict=True):
        names = [name for name in own if not name.startswith("perf/") and "_s" not in name]
        assert {"loss", "kl", "entropy", "ratio", "clip_ratio/region_mean", "grad_norm"} <= set(names)
        assert ("aux_loss" in names) == (family == "qwen3_moe")
        for name in names:
            assert own[name] == pytest.approx(ours[name], abs=TOLERANCE, rel=TOLERANCE), name
        assert 0.1 < own["clip_ratio/region_mean"] < 0.9, "the clip decides nothing"
        assert ours["dta/dense_fallback"] == 0 and "dta/dense_fallback" not in own


@pytest.mark.usefixtures("on_cpu")
def test_switches(models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The flag of a config goes before the process, a trainer of ours on an enabled class runs once, off is stock."""
    calls: list[None] = []
    monkeypatch.setattr(packing, "_flash_attn", lambda: calls.append(None) or plain_kernel())

    def runs_as_tree(classes: Any, **config: Any) -> bool:
        trainer = build(models["qwen3"], tmp_path, samples(2), *classes, **config)
        calls.clear()
        loss_of(trainer, batch_of(trainer))
        count = len(trainer._metrics["train"].get("dta/tree_tokens", []))
        assert count == (not calls)
        return bool(count)

    assert not runs_as_tree(STOCK) and runs_as_tree(TREE) and not runs_as_tree(TREE, use_dta=False)
    with enabled():
        assert runs_as_tree(STOCK) and runs_as_tree(TREE)
        assert runs_as_tree((TreeAsyncGRPOTrainer, AsyncGRPOConfig))
        with pytest.warns(UserWarning, match="follows its own config"):
            assert not runs_as_tree(TREE, use_dta=False)
    assert not runs_as_tree(STOCK)


@pytest.mark.usefixtures("on_cpu")
def test_where_no_tree_runs(models: dict[str, str], tmp_path: Path) -> None:
    """TRL's own path, with TRL's loss; what cannot be followed is refused."""
    rollouts = samples(2)
    expected = dense_loss(dense_model(models["qwen3"]), rollouts[:BATCH]).item()
    for options in ({"dta_min_saving": 0.99}, {"dta_on_unsupported": "dense", "neftune_noise_alpha": 5.0}):
        trainer = build(models["qwen3"], tmp_path, rollouts, *TREE, **options)
        assert loss_of(trainer, batch_of(trainer)).item() == pytest.approx(expected, abs=TOLERANCE)
        assert trainer._metrics["train"]["dta/dense_fallback"] == [1.0]
    trainer = build(models["qwen3"], tmp_path, rollouts, *TREE, neftune_noise_alpha=5.0)
    with pytest.raises(UnsupportedError, match="neftune"):
        loss_of(trainer, batch_of(trainer))
    with pytest.raises(InvalidInputError, match="token_selection"):
        build(models["qwen3"], tmp_path, rollouts, *TREE, dta_token_selection="rpc")


def test_verified(models: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = build(models["gemma2"], tmp_path, samples(2), *TREE, dta_verify="first", dta_regroup="never")
    loss_of(trainer, batch_of(trainer))
    assert "call 0 verified against dense" in caplog.text


def test_options_that_do_nothing(models: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An error in the trainer's own arguments and class; one line for those of a process."""
    with pytest.raises(InvalidInputError, match=r"^dta_regroup='always' does nothing in AsyncGRPO: TRL's own planner"):
        build(models["qwen3"], tmp_path, samples(2), *TREE, dta_regroup="always")
    own = type("Own", (TreeAsyncGRPOTrainer,), {"tree_config": TreeConfig(merge_window="always")})
    with pytest.raises(InvalidInputError, match=r"^merge_window='always' does nothing in AsyncGRPO"):
        build(models["qwen3"], tmp_path, samples(2), own, AsyncGRPOConfig)
    dta_plugin.enable(merge_window="always", prune="never")
    try:
        trainer = build(models["qwen3"], tmp_path, samples(2), AsyncGRPOTrainer, AsyncGRPOConfig)
        loss_of(trainer, batch_of(trainer))
    finally:
        dta_plugin.disable()
    assert "dta: merge_window='always' does nothing in AsyncGRPO" in caplog.text and "prune" not in caplog.text


def test_a_loss_of_its_own_that_passes_by(
    models: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Own(AsyncGRPOTrainer):
        def compute_loss(self, model: nn.Module, inputs: dict[str, torch.Tensor], *_: Any, **__: Any) -> torch.Tensor:
            return sum(p.square().sum() for p in model.parameters())  # type: ignore[return-value]

        def _log_step_metrics(self) -> None: ...

    with enabled():
        build(models["qwen3"], tmp_path, samples(3), Own, AsyncGRPOConfig, max_steps=1).train()
    assert "Own.compute_loss comes from" in caplog.text and "call super().compute_loss" in caplog.text


def test_sinks_only_with_the_plugin(models: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="attention sinks"):
        build(models["gpt_oss"], tmp_path, samples(2), *STOCK)
    with enabled():
        trainer = build(models["gpt_oss"], tmp_path, samples(2), *STOCK)
    assert any(name.endswith("sinks") for name, _ in trainer.model.named_parameters())
    with pytest.raises(UnsupportedError, match="leaves out"):
        loss_of(trainer, batch_of(trainer))


def test_a_row_of_trl_read_back() -> None:
    """Distinct samples, what is trained of them, and values at the places from which they are predicted."""
    rollouts = samples(1)
    row = packing.TreeRow()
    for sample in rollouts:
        row.add(dataclasses.asdict(sample))
    packed = row.pack()
    of_call = ("input_ids", "position_ids", "shift_labels", "tree_kv_index", "tree_cu_seqlens_q", "tree_cu_seqlens_k")
    folded = FoldedRow.from_call({name: packed[name][None] for name in of_call})
    trained: dict[tuple[int, ...], np.ndarray] = {}
    for sample in rollouts:
        trained[tuple(sample.input_ids)] = sample.completion_mask.astype(bool)
    assert {tuple(ids) for ids in folded.sequences} == trained.keys() and len(folded.sequences) == len(trained) < 8
    for ids, mask in zip(folded.sequences, folded.masks, strict=True):
        assert not (trained[tuple(ids)] & ~mask).any()

    values = [torch.from_numpy(ids[1:] + 100.0 * np.arange(1, len(ids))).requires_grad_() for ids in folded.sequences]
    at_places = folded.at_places(values)
    places = packed["token_index"]
    found = iter(at_places[0, places].tolist())
    for sample in rollouts:
        for position in sample.completion_mask.nonzero()[0]:
            assert next(found) == sample.input_ids[position] + 100.0 * position
    at_places[0, places].sum().backward()
    assert sum(float(value.grad.sum()) for value in values if value.grad is not None) == len(places)
    tree = PrefixTree.from_sequences(folded.sequences)
    assert folded.places_of_tokens(tree).sum() == len(packed["input_ids"]) > tree.tree_tokens


def test_rows_of_another_kind_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"without position_ids.*with pixel_values"):
        FoldedRow.from_call(dict.fromkeys(("input_ids", "pixel_values"), torch.ones(1, 2)))


@pytest.mark.long
def test_enabled_before_trl_is_imported() -> None:
    script = (
        "import sys, dta_plugin; dta_plugin.enable()\n"
        "assert 'trl.experimental.async_grpo' not in sys.modules\n"
        "from trl.experimental.async_grpo import AsyncGRPOTrainer as T\n"
        "print(T.compute_loss.__globals__['__name__'], T.__init__.__globals__['__name__'])\n"
        "dta_plugin.disable()\n"
        "print(T.compute_loss.__globals__['__name__'])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    ours, stock = done.stdout.splitlines()[-2:]
    assert ours == "dta_plugin.adapters.trl.patch dta_plugin.adapters.trl.patch"
    assert stock == async_grpo_trainer.__name__
