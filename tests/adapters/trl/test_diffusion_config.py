"""DiffusionGRPOConfig: what it refuses, and that it is parsed like any GRPOConfig."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer, TrlParser

from dta_plugin.adapters.trl import DiffusionGRPOConfig, DiffusionGRPOTrainer, TreeGRPOConfig
from dta_plugin.adapters.trl.diffusion.unsupported_options import _OPTIONS
from dta_plugin.errors import InvalidInputError, UnsupportedError
from dta_plugin.training.diffusion.options import DiffusionOptions
from tests.adapters.trl import diffusion as tiny
from tests.adapters.trl.support import enabled

OPTIONS = {f.name for f in fields(DiffusionOptions)}
BASE: dict[str, Any] = {"output_dir": "unused", "use_cpu": True, "bf16": False, "report_to": "none"}
# GRPOConfig's options without a meaning here, with a value that is not TRL's default.
UNUSED: dict[str, Any] = {
    "use_vllm": True,
    "use_transformers_continuous_batching": True,
    "use_transformers_paged": True,
    "cache_implementation": "static",
    "generation_kwargs": {"top_k": 5},
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "loss_type": "grpo",
    "importance_sampling_level": "sequence",
    "epsilon_high": 0.3,
    "delta": 2.0,
    "off_policy_mask_threshold": 0.5,
    "use_bias_correction_kl": False,
    "top_entropy_quantile": 0.8,
    "entropy_coef": 0.01,
    "use_adaptive_entropy": True,
    "use_liger_kernel": True,
    "cast_lm_head_to_fp32": True,
    "router_aux_loss_coef": 0.01,
    "sync_ref_model": True,
    "max_tool_calling_iterations": 3,
    "deepspeed": "zero2.json",
}
# Per wrong options, what the message says.
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"objective": "ppo"}, "Expected one of bgpo, diffu-grpo, gdsd, trajectory, vrpo"),
    ({"mask_form": "x"}, "Expected one of k, t"),
    ({"length_norm": "width"}, "Expected one of none, length, max_length"),
    ({"remasking": "entropy"}, "Expected one of low_confidence, random"),
    ({"num_elbo_samples": 0}, "Expected at least 1"),
    ({"num_elbo_samples": 3, "coupled_masks": True}, "Expected an even number"),
    ({"bound_clip": 0.0}, "above 0"),
    ({"dual_clip": 1.0}, "above 1"),
    ({"prompt_mask_probability": 1.0, "objective": "diffu-grpo"}, r"in \[0, 1\)"),
    ({"block_length": 0}, "at least 1"),
    ({"max_completion_length": None}, "length of the canvas"),
    ({"attention_block_length": 0}, "at least 1"),
    ({"mask_token_id": -1}, "at least 0"),
    ({"block_length": 48}, "multiple of block_length"),
    ({"diffusion_steps": 17}, "Expected a multiple of"),
    ({"temperature": -1.0}, "at least 0"),
    ({"guidance_scale": -1.0}, "at least 0"),
    ({"kv_cache": "on"}, "Expected one of auto, none, prefix, dual"),
    ({"confidence_threshold": 1.5}, r"a probability in \(0, 1\)"),
    ({"confidence_threshold": 0.9, "diffusion_steps": 128}, "confidence_threshold=0.9 with steps=128"),
    ({"eval_temperature": -1.0}, "In evaluation: temperature=-1.0"),
    ({"eval_max_completion_length": 0}, "In evaluation: gen_length=0"),
    ({"eval_max_completion_length": 48, "block_length": 32}, "In evaluation: gen_length=48, block_length=32"),
    ({"eval_max_completion_length": 255, "diffusion_steps": 128}, "as many tokens per model call"),
    ({"objective": "bgpo", "epsilon": 0.5}, "objective='diffu-grpo'"),
    ({"prompt_mask_probability": 0.3}, "objective='diffu-grpo'"),
    ({"objective": "vrpo", "bound_clip": 0.2}, "objective='bgpo'"),
    ({"objective": "vrpo", "dual_clip": 3.0}, "objective='bgpo'"),
    ({"objective": "diffu-grpo", "num_elbo_samples": 4}, "objective='bgpo' or 'gdsd' or 'vrpo'"),
    ({"objective": "diffu-grpo", "mask_form": "t"}, "objective='bgpo' or 'gdsd' or 'vrpo'"),
    ({"objective": "diffu-grpo", "stratified_masks": False}, "objective='bgpo' or 'gdsd' or 'vrpo'"),
    ({"objective": "diffu-grpo", "coupled_masks": True}, "objective='bgpo' or 'gdsd' or 'vrpo'"),
    ({"objective": "diffu-grpo", "length_norm": "none"}, "objective='bgpo' or 'trajectory' or 'vrpo'"),
    ({"objective": "trajectory", "bound_clip": 0.2}, "objective='bgpo'"),
    ({"objective": "trajectory", "coupled_masks": True}, "objective='bgpo' or 'gdsd' or 'vrpo'"),
    ({"objective": "trajectory", "score_fillers": True}, "objective='bgpo' or 'gdsd' or 'vrpo' or 'diffu-grpo'"),
    ({"objective": "gdsd", "length_norm": "none"}, "objective='bgpo' or 'trajectory' or 'vrpo'"),
    ({"objective": "gdsd", "dual_clip": 3.0}, "objective='bgpo'"),
    ({"objective": "gdsd", "advantage_scale": 0.0}, "Expected a finite value above 0"),
    ({"objective": "gdsd", "epsilon": 1.0}, "Expected a value between 0 and 1"),
    ({"objective": "bgpo", "advantage_scale": 0.5}, "objective='gdsd'"),
    ({"score_fillers": True}, "Expected score_fillers=False .leave it out., or objective='bgpo' or 'gdsd'"),
    ({"mask_form": "t"}, "mask_form=t with objective='trajectory', which does not use it"),
    ({"optim": "lomo"}, "adamw_torch"),
]


def test_every_unused_option_is_listed_here() -> None:
    assert UNUSED.keys() == _OPTIONS.keys()


@pytest.mark.parametrize("name", UNUSED)
def test_unused_options_are_refused(name: str) -> None:
    with pytest.raises(InvalidInputError, match=f"{name}=.* for a diffusion LM: .*Expected {name}=.*leave it out"):
        DiffusionGRPOConfig(**BASE, **{name: UNUSED[name]})


@pytest.mark.parametrize(("options", "message"), WRONG, ids=lambda value: str(value)[:60])
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        DiffusionGRPOConfig(**BASE, **options)


def test_deepspeed_from_the_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    own = GRPOConfig.__post_init__

    def launched(self: GRPOConfig) -> None:
        own(self)
        self.deepspeed_plugin = object()

    monkeypatch.setattr(GRPOConfig, "__post_init__", launched)
    with pytest.raises(InvalidInputError, match="DeepSpeed"):
        DiffusionGRPOConfig(**BASE)


def test_fields_are_those_of_the_options() -> None:
    own = {f.name: (f.type, f.default, f.metadata["help"]) for f in fields(DiffusionGRPOConfig) if f.name in OPTIONS}
    types = get_type_hints(DiffusionOptions)
    assert own == {f.name: (types[f.name], f.default, f.metadata["help"]) for f in fields(DiffusionOptions)}
    assert DiffusionGRPOConfig(**BASE).diffusion_options == DiffusionOptions()
    given = DiffusionGRPOConfig(**BASE, objective="vrpo", mask_form="t", is_shifted=True).diffusion_options
    assert given == DiffusionOptions(objective="vrpo", mask_form="t", is_shifted=True)


def test_defaults() -> None:
    config = DiffusionGRPOConfig(**BASE, max_completion_length=256)
    assert (config.objective, config.num_elbo_samples, config.length_norm) == ("trajectory", 16, "length")
    assert (config.sampler_config(None).block_length, config.sampler_config(None).calls_per_block) == (32, 16)
    assert (config.sampler_config(4).block_length, config.sampler_config(4).calls_per_block) == (4, 2)
    odd = DiffusionGRPOConfig(**BASE, max_completion_length=7).sampler_config(None)
    assert (odd.block_length, odd.calls_per_block) == (7, 4)
    assert config.eval_sampler_config(4) == config.sampler_config(4)


def test_evaluation_samples_as_it_is_told_to() -> None:
    config = DiffusionGRPOConfig(
        **BASE, max_completion_length=64, diffusion_steps=16, eval_temperature=0.0, eval_max_completion_length=128
    )
    training, found = config.sampler_config(None), config.eval_sampler_config(None)
    assert (training.temperature, training.gen_length, training.steps) == (1.0, 64, 16)
    assert (found.temperature, found.gen_length, found.steps) == (0.0, 128, 32)  # four tokens per call in both


def test_yaml(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("objective: vrpo\nnum_elbo_samples: 4\nblock_length: 16\nis_shifted: true\nuse_cpu: true\n")
    (config,) = TrlParser((DiffusionGRPOConfig,)).parse_args_and_config(
        ["--config", str(recipe), "--output_dir", str(tmp_path), "--bf16", "false", "--coupled_masks", "true"]
    )
    assert (config.objective, config.num_elbo_samples, config.block_length) == ("vrpo", 4, 16)
    assert config.is_shifted is True and config.coupled_masks is True


@pytest.mark.parametrize("name", ["tools", "rollout_func", "environment_factory"])
def test_arguments_that_need_another_generation_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=f"Got {name}"):
        tiny.trainer(tmp_path, trainer_options={name: [len] if name == "tools" else len})


@pytest.mark.parametrize("kind", [GRPOConfig, TreeGRPOConfig])
def test_another_config_is_refused(kind: type) -> None:
    args = kind(output_dir="unused", use_cpu=True, bf16=False)
    with pytest.raises(InvalidInputError, match="Expected a DiffusionGRPOConfig"):
        DiffusionGRPOTrainer(tiny.model(), len, args, train_dataset=Dataset.from_dict({"prompt": ["w5"]}))


def test_prefix_trees_are_refused(tmp_path: Path) -> None:
    with enabled(), pytest.raises(InvalidInputError, match="Prefix trees are switched on"):
        tiny.trainer(tmp_path)


def test_a_router_loss_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="mixture of experts"):
        tiny.trainer(tmp_path, tiny.diffusion_model("qwen3_moe", vocab_size=40))


def test_a_model_of_no_known_family_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="mask_token_id="):
        tiny.trainer(tmp_path, mask_token_id=None)


def test_blocks_other_than_the_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="set block_length=4"):
        tiny.trainer(tmp_path, attention_block_length=4, block_length=2, max_completion_length=8)


def test_a_mistyped_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="Got the model 'runs/mistyped/model'"):
        tiny.trainer(tmp_path, "runs/mistyped/model")


@pytest.mark.parametrize("option", ["max_completion_length", "eval_max_completion_length"])
def test_a_canvas_that_is_too_long_is_refused(option: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="a canvas of 16 for a model with 16 positions"):
        tiny.trainer(tmp_path, tiny.model(max_position_embeddings=16), **{option: 16})


def test_a_release_without_the_hooks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(GRPOTrainer, "_generate_single_turn")
    with pytest.raises(UnsupportedError, match=r"_generate_single_turn is missing. Expected what TRL 1\.0"):
        tiny.trainer(tmp_path)
