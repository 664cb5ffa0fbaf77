"""A diffusion LM in verl's engine: the gradient is that of the paper's bound, whatever the micro-batches."""

from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("verl", reason="verl is not installed: pip install 'dta-plugin[verl]'")

from verl.utils import tensordict_utils as tu

from dta_plugin.adapters.verl_plugin.diffusion.micro_batch import TERMS, diffusion_batch
from dta_plugin.errors import UnsupportedError
from tests.adapters.verl.diffusion_support import (
    SAMPLES,
    advantages_of,
    carry_terms,
    distance_gradient,
    engine_gradient,
    engine_of,
    graph_gradient,
    largest_difference,
    mini_batch,
    norm,
    record_steps,
    save_diffusion_model,
    settings,
    step_gradient,
)
from tests.adapters.verl.support import nested


@pytest.fixture(scope="module")
def diffusion_folder(rank: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_diffusion_model(tmp_path_factory.mktemp("diffusion"))


@pytest.fixture(scope="module")
def graph(diffusion_folder: Path) -> Any:
    """The gradient of mini_batch(shape), on-policy, computed once."""
    return functools.cache(
        lambda shape, step=0: graph_gradient(diffusion_folder, mini_batch(shape=shape), None, step=step)
    )


@pytest.mark.parametrize("shape", ["groups", "turns"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_on_policy_gradient(shape: str, checkpointing: bool, graph: Any, diffusion_folder: Path) -> None:
    engine = engine_of(diffusion_folder, settings(), checkpointing=checkpointing)
    found, outputs = engine_gradient(engine, mini_batch(shape=shape))
    expected, loss = graph(shape)
    assert largest_difference(found, expected) < 1e-5
    assert sum(outputs["loss"]) == pytest.approx(loss, abs=1e-6)
    assert largest_difference(found, graph(shape, 1)[0]) > 1e-2  # other noise


@pytest.mark.parametrize("cut", [{"budget": 40}, {"budget": 1000}, {"rows": 1}, {"rows": 4}, {"rows": 16}], ids=str)
def test_micro_batches_add_up(cut: dict[str, int], graph: Any, diffusion_folder: Path) -> None:
    found, outputs = engine_gradient(engine_of(diffusion_folder, settings()), mini_batch(**cut))
    assert largest_difference(found, graph("groups")[0]) < 1e-5
    metrics = {name: metric.aggregate() for name, metric in outputs["metrics"].items()}
    assert metrics["diffusion/rows_skipped"] == int((advantages_of(16) == 0).sum()) > 4
    assert metrics["diffusion/bound_gap"] == 0
    assert metrics["diffusion/elbo"] == pytest.approx(-5, abs=2)


def test_fsdp1(graph: Any, diffusion_folder: Path) -> None:
    found, _ = engine_gradient(engine_of(diffusion_folder, settings(), "fsdp"), mini_batch())
    assert norm(found) == pytest.approx(norm(graph("groups")[0]), rel=1e-5)
    assert norm(found) != pytest.approx(norm(graph("groups", 1)[0]), rel=1e-3)


@pytest.mark.parametrize("length_norm", ["none", "length", "max_length"])
def test_off_policy_gradient(length_norm: str, diffusion_folder: Path) -> None:
    """Old terms come from verl's log-prob pass, through verl's data, and count in both branches of the bound."""
    engine, data = engine_of(diffusion_folder, settings(length_norm=length_norm)), mini_batch(shape="turns")
    old = carry_terms(engine, data, moved=0.9)
    lengths = data["responses"].offsets().diff().tolist()
    scale = {"none": None, "length": [1 / n for n in lengths], "max_length": [1 / 12] * len(lengths)}[length_norm]
    expected, loss = graph_gradient(diffusion_folder, data, old, scale)
    found, outputs = engine_gradient(engine, data)
    assert largest_difference(found, expected) < 1e-5
    assert sum(outputs["loss"]) == pytest.approx(loss, abs=1e-5)
    assert outputs["metrics"]["diffusion/bound_gap"].aggregate() > 1e-4
    on_policy, _ = graph_gradient(diffusion_folder, data, None, scale)
    assert largest_difference(found, on_policy) > 1e-2


def test_one_graph(diffusion_folder: Path) -> None:
    """objective=vrpo: what the bound of the same terms is below, with another gradient."""
    engine, data = engine_of(diffusion_folder, settings(objective="vrpo")), mini_batch(shape="turns")
    old = carry_terms(engine, data, moved=0.9)
    expected, loss = graph_gradient(diffusion_folder, data, old, objective="vrpo")
    found, outputs = engine_gradient(engine, data)
    assert largest_difference(found, expected) < 1e-5
    assert sum(outputs["loss"]) == pytest.approx(loss, abs=1e-5)
    bound, _ = graph_gradient(diffusion_folder, data, old)
    assert largest_difference(found, bound) > 1e-2


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
def test_siblings_share_their_prompt_where_attention_has_blocks(strategy: str, diffusion_folder: Path) -> None:
    found = {}
    for share in ("auto", "never"):
        given = settings(attention_block_length=2, share_prompts=share)
        found[share] = engine_gradient(engine_of(diffusion_folder, given, strategy), mini_batch())
    assert largest_difference(found["auto"][0], found["never"][0]) < 1e-5
    metrics = {name: metric.aggregate() for name, metric in found["auto"][1]["metrics"].items()}
    assert 0 < metrics["diffusion/tree_tokens"] < 0.9 * metrics["diffusion/flat_tokens"]
    other, _ = engine_gradient(engine_of(diffusion_folder, settings(attention_block_length=3), strategy), mini_batch())
    assert largest_difference(other, found["auto"][0]) > 1e-2  # control


@pytest.mark.parametrize("moved", [0.0, 0.9])
def test_trajectory(moved: float, diffusion_folder: Path) -> None:
    """The record of steps comes with verl's data; without it, or with another response's, nothing runs."""
    given, data = settings(objective="trajectory"), mini_batch(shape="turns")
    with pytest.raises(UnsupportedError, match="without the steps in which it was written"):
        engine_gradient(engine_of(diffusion_folder, given), data)
    record_steps(data)
    engine = engine_of(diffusion_folder, given)
    old = carry_terms(engine, data, moved=moved) if moved else None
    found, outputs = engine_gradient(engine, data)
    assert largest_difference(found, step_gradient(diffusion_folder, data, old)) < 1e-5
    metrics = {name: metric.aggregate() for name, metric in outputs["metrics"].items()}
    assert (metrics["diffusion/clip_fraction"] > 0) == (moved > 0)
    bound, _ = graph_gradient(diffusion_folder, data, None)
    assert largest_difference(found, bound) > 1e-2
    extras = list(data["extra_fields"])
    tu.assign_non_tensor_stack(data, "extra_fields", extras[1:] + extras[:1])
    with pytest.raises(UnsupportedError, match="of another one"):
        engine_gradient(engine_of(diffusion_folder, given), data)


@pytest.mark.parametrize("moved", [0.0, 0.9])
def test_squared_distance(moved: float, diffusion_folder: Path) -> None:
    """Off-policy rows without advantage are held where they were; those that fill up a mini-batch do not count."""
    engine, data = engine_of(diffusion_folder, settings(objective="gdsd")), mini_batch(shape="turns")
    old = carry_terms(engine, data, moved=moved) if moved else None
    masks = list(data["response_mask"].unbind())
    data["response_mask"] = nested([*masks[:-1], torch.zeros_like(masks[-1])])
    found, outputs = engine_gradient(engine, data)
    assert largest_difference(found, distance_gradient(diffusion_folder, data, old)) < 1e-5
    metrics = {name: metric.aggregate() for name, metric in outputs["metrics"].items()}
    counts = len(data) - 1 if moved else int((advantages_of(len(data)) != 0).sum())
    assert metrics["diffusion/rows_kept"] == counts
    assert (metrics["diffusion/clip_fraction"] > 0.3) == (moved > 0)
    data["response_mask"] = nested(masks)  # control: the last row, without advantage, counts off-policy
    other, _ = engine_gradient(engine_of(diffusion_folder, settings(objective="gdsd")), data)
    assert (largest_difference(found, other) > 1e-3) == (moved > 0)


def test_log_prob_pass(diffusion_folder: Path) -> None:
    """Terms are the same in any micro-batch, and those of the update; what verl would read as log-probs is NaN."""
    engine, data = engine_of(diffusion_folder, settings()), mini_batch(budget=1000)
    terms = carry_terms(engine, data)
    assert terms.shape == (16, SAMPLES) and terms.isfinite().all()
    assert torch.allclose(terms, carry_terms(engine, mini_batch(rows=2)), atol=1e-5)
    with engine.eval_mode():
        outputs = engine.infer_batch(data.copy(), loss_function=None)["model_output"]
    for name in ("log_probs", "entropy"):
        assert outputs[name].offsets().equal(data["input_ids"].offsets())
        assert outputs[name].values().isnan().all()
    _, update = engine_gradient(engine, data)
    assert update["metrics"]["diffusion/bound_gap"].aggregate() == pytest.approx(0.0, abs=1e-9)
    ran, lengths = advantages_of(16) != 0, data["responses"].offsets().diff()
    per_token = terms[ran].mean(dim=1).sum() / lengths[ran].sum()
    assert update["metrics"]["diffusion/elbo"].aggregate() == pytest.approx(per_token.item(), rel=1e-5)


def test_no_terms_where_one_step_uses_every_row(diffusion_folder: Path) -> None:
    """And a second optimizer step without them is an error."""
    engine = engine_of(diffusion_folder, settings(rows_per_step=16))
    with engine.eval_mode():
        outputs = engine.infer_batch(mini_batch(), loss_function=None)["model_output"]
    assert TERMS not in outputs and outputs["log_probs"].values().isnan().all()
    engine_gradient(engine, mini_batch())
    with pytest.raises(UnsupportedError, match=r"second optimizer step.*dta_elbo_terms"):
        engine_gradient(engine, mini_batch())
    engine.lr_scheduler_step()  # the next batch of rollouts
    engine_gradient(engine, mini_batch())


def test_seeds_belong_to_rows() -> None:
    data = mini_batch(shape="turns")
    seeds = diffusion_batch(data, 0, step=3).seeds
    assert torch.equal(diffusion_batch(tu.index_select_tensor_dict(data, [5, 6, 7, 8]), 0, step=3).seeds, seeds[5:9])
    assert not (diffusion_batch(data, 0, step=4).seeds == seeds).any()
    assert len(set(seeds.tolist())) == len({tuple(row.tolist()) for row in data["input_ids"].unbind()}) == len(data) - 1


def test_ranks_synchronise_once(diffusion_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """verl defers it in all micro-batches but the last; there, samples before the last defer it, too."""
    engine, said = engine_of(diffusion_folder, settings()), []
    set_sync = engine.module.set_requires_gradient_sync
    monkeypatch.setattr(
        engine.module, "set_requires_gradient_sync", lambda flag, **_: (said.append(flag), set_sync(flag))
    )
    engine_gradient(engine, mini_batch(rows=8))
    assert said == [False, True] * 2


def test_bfloat16(graph: Any, diffusion_folder: Path) -> None:
    found, _ = engine_gradient(engine_of(diffusion_folder, settings(), dtype="bf16"), mini_batch())
    assert largest_difference(found, graph("groups")[0]) < 3e-2


def test_every_sample_passes_the_scaler(graph: Any, diffusion_folder: Path) -> None:
    """verl has one for fp16; on a CPU it does nothing."""
    engine = engine_of(diffusion_folder, settings())
    engine.scaler = SimpleNamespace(scale=lambda loss: 8.0 * loss)
    found, _ = engine_gradient(engine, mini_batch())
    assert largest_difference({name: gradient / 8.0 for name, gradient in found.items()}, graph("groups")[0]) < 1e-5


def test_lora_trains_the_adapter_alone(diffusion_folder: Path) -> None:
    engine = engine_of(diffusion_folder, settings(), lora=True)
    found, _ = engine_gradient(engine, mini_batch())
    assert found and all("lora_" in name for name in found) and norm(found) > 1e-3
