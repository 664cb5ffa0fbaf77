"""Options of diffusion LMs, and what neither they nor the bound go with: errors that name the setting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("verl", reason="verl is not installed: pip install 'dta-plugin[verl]'")

from omegaconf import OmegaConf
from verl.utils import tensordict_utils as tu

from dta_plugin.adapters.verl_plugin.config import tree_config
from dta_plugin.adapters.verl_plugin.diffusion.guards import check_model
from dta_plugin.adapters.verl_plugin.diffusion.updates import DiffusionUpdates
from dta_plugin.adapters.verl_plugin.diffusion.worker import diffusion_settings
from dta_plugin.adapters.verl_plugin.run_checks import check_run
from dta_plugin.config import TreeConfig
from dta_plugin.errors import InvalidInputError, UnsupportedError
from dta_plugin.training.diffusion.options import DiffusionOptions
from tests.adapters.verl.diffusion_support import (
    engine_gradient,
    engine_of,
    mini_batch,
    save_diffusion_model,
    settings,
)
from tests.adapters.verl.support import Setup, Step, build, log_probs, nested
from tests.adapters.verl.support import mini_batch as causal_batch


@pytest.fixture(scope="module")
def diffusion_folder(rank: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_diffusion_model(tmp_path_factory.mktemp("diffusion"))


def config(options: Any, **changes: Any) -> Any:
    """What a worker is given as `actor_rollout_ref`."""
    found = OmegaConf.create(
        {
            "model": {"use_fused_kernels": False},
            "rollout": {
                "name": "hf_cpu",
                "n": 8,
                "response_length": 64,
                "calculate_log_probs": False,
                "custom": {"dta": options},
            },
            "actor": {
                "loss_agg_mode": "seq-mean-token-sum",
                "ppo_mini_batch_size": 4,
                "ppo_epochs": 1,
                "policy_loss": {"loss_mode": "vanilla"},
                "use_kl_loss": False,
            },
        }
    )
    for name, value in changes.items():
        OmegaConf.update(found, name.replace("__", "."), value, force_add=True)
    return found


def test_settings() -> None:
    assert diffusion_settings(config({})) is None
    assert diffusion_settings(config(None)) is None
    options = {"diffusion": {"objective": "bgpo", "num_elbo_samples": 4, "diffusion_steps": 32, "score_fillers": True}}
    found = diffusion_settings(config(options, actor__loss_agg_mode="seq-mean-token-mean"))
    assert found is not None
    assert found.options == DiffusionOptions(
        objective="bgpo", num_elbo_samples=4, diffusion_steps=32, score_fillers=True
    )
    assert (found.options.length_norm, found.max_length, found.rows_per_step) == ("length", 64, 32)
    found = diffusion_settings(config(options, actor__ppo_epochs=2))
    assert found is not None and found.rows_per_step is None
    assert tree_config(config(options).rollout) is None


def test_defaults_are_those_of_the_options() -> None:
    found = diffusion_settings(config({"diffusion": {}}, actor__loss_agg_mode="seq-mean-token-mean"))
    assert found is not None and found.options == DiffusionOptions()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"diffusion": True}, r"diffusion=True. Expected a mapping with fields among objective, num_elbo_samples"),
        (
            {"diffusion": {"sample": 4}},
            r"'sample': 4.*Expected a mapping with fields among objective, num_elbo_samples",
        ),
        ({"diffusion": {"num_elbo_samples": 0}}, "samples=0"),
        ({"diffusion": {"num_elbo_samples": 3, "coupled_masks": True}}, "even number"),
        ({"diffusion": {"mask_form": "q"}}, "form='q'"),
        ({"diffusion": {"bound_clip": -1.0}}, "clip=-1.0"),
        ({"diffusion": {"block_length": 48}}, "gen_length=64, block_length=48"),
        ({"diffusion": {"diffusion_steps": 65}}, "steps=65"),
        ({"diffusion": {"diffusion_steps": 64, "confidence_threshold": 0.9}}, "confidence_threshold=0.9 with steps=64"),
        ({"diffusion": {"kv_cache": "on"}}, "Expected one of auto, none, prefix, dual"),
        ({"diffusion": {"length_norm": "none"}}, "length_norm='none'. Expected none; set .*actor.loss_agg_mode"),
        ({"diffusion": {"objective": "diffu-grpo"}}, "Expected 'bgpo', 'gdsd', 'trajectory' or 'vrpo'"),
        ({"diffusion": {"score_fillers": True}}, "score_fillers=True with objective='trajectory'.*objective='bgpo'"),
        ({"diffusion": {"objective": "vrpo", "bound_clip": 0.2}}, "objective='bgpo'"),
        ({"diffusion": {}, "executor": "packed"}, "Got executor besides"),
        ({"diffusion": {}, "use_dta": False}, "Got use_dta besides"),
    ],
)
def test_wrong_options_raise(options: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message) as error:
        diffusion_settings(config(options))
    assert "actor_rollout_ref.rollout.custom.dta.diffusion" in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rollout__name", "vllm"),
        ("rollout__calculate_log_probs", True),
        ("rollout__multi_turn__enable", True),
        ("rollout__top_p", 0.9),
        ("rollout__top_k", 20),
        ("rollout__val_kwargs__top_p", 0.9),
        ("rollout__val_kwargs__top_k", 20),
        ("actor__loss_agg_mode", "token-mean"),
        ("actor__loss_scale_factor", 100),
        ("actor__policy_loss__loss_mode", "gspo"),
        ("actor__clip_ratio_high", 0.28),
        ("actor__use_kl_loss", True),
        ("actor__entropy_coeff", 0.01),
        ("actor__calculate_entropy", True),
        ("model__use_fused_kernels", True),
    ],
)
def test_settings_of_verl_that_do_not_fit(name: str, value: Any) -> None:
    with pytest.raises(UnsupportedError, match="Expected") as error:
        diffusion_settings(config({"diffusion": {"objective": "bgpo"}}, **{name: value}))
    assert f"actor_rollout_ref.{name.replace('__', '.')}={value!r}" in str(error.value)
    diffusion_settings(config({"executor": "packed"}, **{name: value}))  # not the tree's concern


def test_a_mistyped_model_is_named_on_the_driver(diffusion_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("verl.trainer.ppo.utils.need_reference_policy", lambda _: False)
    for path in (str(diffusion_folder), "hdfs://of/verl/to/fetch"):
        run = config({"diffusion": {}}, model__path=path, actor__strategy="fsdp2")
        check_run(OmegaConf.create({"actor_rollout_ref": run}))
    empty = str(diffusion_folder.parent)
    for path, message in (
        ("runs/no/model", "Got the model 'runs/no/model'. Expected a directory"),
        (empty, "no config"),
    ):
        run = config({"diffusion": {}}, model__path=path, actor__strategy="fsdp2")
        with pytest.raises(InvalidInputError, match=message):
            check_run(OmegaConf.create({"actor_rollout_ref": run}))


def test_the_clip_range_of_steps_is_verls() -> None:
    options: dict[str, Any] = {"diffusion": {}}
    found = diffusion_settings(config(options, actor__clip_ratio_low=0.3, actor__clip_ratio_high=0.3))
    assert found is not None and found.epsilon == 0.3
    with pytest.raises(UnsupportedError, match=r"clip_ratio_high=\[0\.2, 0\.2, 0\.28\].*one range"):
        diffusion_settings(config(options, actor__clip_ratio_high=0.28))
    with pytest.raises(UnsupportedError, match="one range"):
        diffusion_settings(config(options, actor__clip_ratio=0.3))


def test_gdsd_divides_by_the_width_of_the_canvas() -> None:
    options = {"diffusion": {"objective": "gdsd", "advantage_scale": 0.05}}
    mode = {"actor__loss_agg_mode": "seq-mean-token-sum-norm"}
    found = diffusion_settings(config(options, **mode, actor__clip_ratio_low=0.3, actor__clip_ratio_high=0.3))
    assert found is not None and (found.epsilon, found.max_length, found.options.advantage_scale) == (0.3, 64, 0.05)
    with pytest.raises(UnsupportedError, match="Expected 'seq-mean-token-sum-norm': gdsd divides by the width"):
        diffusion_settings(config(options))
    with pytest.raises(InvalidInputError, match=r"epsilon=1\.0.*between 0 and 1"):
        diffusion_settings(config(options, **mode, actor__clip_ratio_low=1.0, actor__clip_ratio_high=1.0))


def test_verl_08(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dta_plugin.adapters.verl_plugin.diffusion.guards.version", lambda _: "0.8.0")
    with pytest.raises(UnsupportedError, match=r"verl 0\.8\.0 is installed. Expected 0\.9 or newer"):
        diffusion_settings(config({"diffusion": {}}))


@pytest.mark.parametrize("options", [TreeConfig(), TreeConfig(on_unsupported="dense"), None])
def test_a_diffusion_lm_is_never_taken_for_causal(options: TreeConfig | None, diffusion_folder: Path) -> None:
    engine = build(Setup(), diffusion_folder, tree=True)
    with pytest.raises(UnsupportedError, match=r"is a diffusion LM.*custom\.dta\.diffusion"):
        engine.configure(options)


def test_other_models_are_judged_elsewhere(folder: Path) -> None:
    """A causal model, and what is no language model, which other guards refuse or let run as verl does."""
    check_model(build(Setup(), folder, tree=True).module, is_diffusion=False)
    check_model(torch.nn.Linear(2, 2), is_diffusion=False)


def test_nor_by_an_engine_that_was_told_nothing(diffusion_folder: Path) -> None:
    with pytest.raises(UnsupportedError, match="attends in both directions"):
        log_probs(build(Setup(), diffusion_folder, tree=True), causal_batch(Step()))


def test_a_causal_model_with_diffusion_options(folder: Path) -> None:
    with pytest.raises(UnsupportedError, match="not a diffusion family"):
        engine_of(folder, settings())


def test_a_reference_policy(diffusion_folder: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"use_kl_loss=False and algorithm\.use_kl_in_reward=False"):
        engine_of(diffusion_folder, settings(), forward_only=True)


def _several(data: Any) -> None:
    data["advantages"] = nested([row + torch.arange(len(row)) for row in data["advantages"].unbind()])


def _not_finite(data: Any) -> None:
    data["advantages"] = nested([row * float("nan") for row in data["advantages"].unbind()])


def _tools(data: Any) -> None:
    data["response_mask"] = nested([torch.arange(len(row)) != 1 for row in data["response_mask"].unbind()])


def _old_trainer(data: Any) -> None:
    data["prompts"] = data["prompts"].to_padded_tensor(0)


def _two_samples(data: Any) -> None:
    data["dta_elbo_terms"] = torch.zeros(len(data), 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_several, "adv_estimator=grpo"),
        (_not_finite, "use_kl_in_reward=False"),
        (_tools, "1 without loss"),
        (_old_trainer, "use_v1=True"),
        (_two_samples, "one term per row and sample"),
        (lambda data: tu.assign_non_tensor(data, calculate_sum_pi_squared=True), "calculate_sum_pi_squared"),
    ],
)
def test_batches_that_do_not_fit(change: Any, message: str, diffusion_folder: Path) -> None:
    engine, data = engine_of(diffusion_folder, settings()), mini_batch(rows=16)
    change(data)
    with pytest.raises((UnsupportedError, InvalidInputError), match=message):
        engine_gradient(engine, data)


def test_padding_rows_count_for_nothing(diffusion_folder: Path) -> None:
    """verl fills up the last mini-batch with rows whose mask is 0."""
    engine, data = engine_of(diffusion_folder, settings()), mini_batch(rows=16)
    data["response_mask"] = nested([torch.zeros(len(row)) for row in data["response_mask"].unbind()])
    _, outputs = engine_gradient(engine, data)
    assert isinstance(engine._dta_diffusion, DiffusionUpdates)
    assert outputs["metrics"]["diffusion/rows_skipped"].aggregate() == 16


def test_dropout(diffusion_folder: Path) -> None:
    engine = build(Setup(), diffusion_folder, tree=True)
    engine.module.config.attention_dropout = 0.1
    with pytest.raises(InvalidInputError, match=r"attention_dropout=0\.1"):
        engine.configure(None, settings())
