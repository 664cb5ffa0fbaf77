"""What a tree cannot follow is refused by name, on all ranks and before anything runs; or verl's own path is taken."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from tensordict import NonTensorStack
from verl.utils import tensordict_utils as tu
from verl.utils.megatron_utils import unwrap_model

from dta_plugin.adapters.verl_plugin import install
from dta_plugin.adapters.verl_plugin.megatron.obstacles import engine_obstacle
from dta_plugin.adapters.verl_plugin.protocols import TreePolicyEngine
from dta_plugin.adapters.verl_plugin.run_checks import check_run
from dta_plugin.config import TreeConfig
from dta_plugin.errors import InvalidInputError, UnsupportedError
from tests.adapters.megatron.support import Setup, build, difference, inferred, train
from tests.adapters.verl.support import Step, mini_batch

ENGINE: dict[str, tuple[Any, str]] = {
    "context_parallel_size": (2, "context parallelism"),
    "dynamic_context_parallel": (True, "context parallelism"),
    "router_replay": (SimpleNamespace(mode="R2"), "router replay"),
    "use_fused_kernels": (True, "fused kernels"),
    "use_megatron_fsdp": (True, "Megatron-FSDP"),
}
TRANSFORMER: dict[str, tuple[Any, str]] = {
    "multi_latent_attention": (True, "MLA"),
    "mtp_num_layers": (1, "MTP"),
    "fp8": ("hybrid", "fp8"),
    "experimental_attention_variant": ("gated_delta_net", "recurrent"),
    "moe_enable_routing_replay": (True, "router replay"),
    "attention_dropout": (0.1, "dropout"),
    "moe_z_loss_coeff": (1e-3, "z-loss"),
    "moe_expert_capacity_factor": (1.0, "drops"),
    "mrope_section": ([1, 1, 2], "mRoPE"),
    "softmax_type": ("learnable", "sinks"),
    "fused_single_qkv_rope": (True, "packed rows"),
    "cuda_graph_impl": ("local", "CUDA graphs"),
    "window_size": ((-1, 0), "no window"),
}


@pytest.fixture(scope="module")
def engine(folder: Path) -> Any:
    return build(Setup(), folder, tree=True)


def test_nothing_is_in_the_way(engine: Any) -> None:
    assert engine_obstacle(engine) is None


@pytest.mark.parametrize("name", ENGINE)
def test_settings_of_the_engine(name: str, engine: Any) -> None:
    value, words = ENGINE[name]
    before = getattr(engine.engine_config, name)
    object.__setattr__(engine.engine_config, name, value)
    try:
        assert words in str(engine_obstacle(engine))
    finally:
        object.__setattr__(engine.engine_config, name, before)


@pytest.mark.parametrize("name", TRANSFORMER)
def test_settings_of_the_model(name: str, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    value, words = TRANSFORMER[name]
    monkeypatch.setattr(engine.tf_config, name, value, raising=False)
    found = str(engine_obstacle(engine))
    assert words in found and f"{name}={value}" in found


def test_kinds_of_models_and_layers(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = unwrap_model(engine.module[0])
    with monkeypatch.context() as patch:
        patch.setattr(model, "__class__", type("Qwen2_5VLModel", (type(model),), {}))
        assert "images" in str(engine_obstacle(engine))
    attention = model.decoder.layers[1].self_attention
    with monkeypatch.context() as patch:
        patch.setattr(attention, "__class__", type("GatedDeltaNet", (type(attention),), {}))
        assert "layer 2 attends by GatedDeltaNet" in str(engine_obstacle(engine))


def test_load_balancing_losses(folder: Path) -> None:
    balancing = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.01}
    setup = Setup("moe", transformer=balancing)
    found = build(setup, folder, tree=True)
    with pytest.raises(UnsupportedError, match=r"moe_router_load_balancing_type=aux_loss.*set .*=none"):
        inferred(found, mini_batch(Step()))
    step = Step(config=TreeConfig(on_unsupported="dense"))
    stock, dense = (train(build(setup, folder, tree), [step])[0] for tree in (False, True))
    assert difference(dense, stock) == 0
    assert dense["dta"]["dta/dense_fallback"] == 1


def test_dropout_of_adapters(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    linear = unwrap_model(engine.module[0]).decoder.layers[1].self_attention.linear_qkv
    monkeypatch.setattr(linear, "adapter", torch.nn.Dropout(0.1), raising=False)
    found = str(engine_obstacle(engine))
    assert "linear_qkv.adapter has p=0.1" in found and "model.lora.dropout=0.0" in found


def test_experts_whose_gradients_megatron_does_not_add_up(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On two tensor-parallel ranks with whole experts, stock verl's gradient norm was 2% below that of one rank."""
    config = engine.tf_config
    for name, value in (("num_moe_experts", 4), ("moe_router_load_balancing_type", "none")):
        monkeypatch.setattr(config, name, value)
    monkeypatch.setattr(config, "tensor_model_parallel_size", 2)
    for ranks, whole, is_refused in ((1, 1, True), (2, 1, False), (1, 2, False), (1, None, False)):
        monkeypatch.setattr(config, "expert_model_parallel_size", ranks)
        monkeypatch.setattr(config, "expert_tensor_parallel_size", whole)
        assert ("does not add up experts' gradients" in str(engine_obstacle(engine))) == is_refused


def _with_images(data: Any) -> None:
    data["multi_modal_inputs"] = NonTensorStack(*[{"pixel_values": torch.ones(1)} for _ in range(len(data))])


def _with_routes(data: Any) -> None:
    data["routed_experts"] = torch.zeros(len(data), 1)


def _with_topk(data: Any) -> None:
    tu.assign_non_tensor(data, distillation_use_topk=True)


CHANGES = [(_with_images, "images"), (_with_routes, "router replay"), (_with_topk, "top-k distillation")]


@pytest.mark.parametrize("verify", ["off", "every:1"])
@pytest.mark.parametrize(("change", "words"), CHANGES)
def test_batches(change: Any, words: str, verify: str, engine: Any) -> None:
    """By name, whatever else verl's own path, which `verify` runs, would say of them."""
    engine.configure(TreeConfig(verify=verify))
    data = mini_batch(Step())
    change(data)
    with pytest.raises(UnsupportedError, match=words):
        inferred(engine, data)


@pytest.mark.parametrize("option", [{"executor": "streamed"}, {"max_tree_tokens_per_chunk": 64}])
def test_no_streaming(option: dict[str, Any], engine: Any) -> None:
    with pytest.raises(InvalidInputError, match="strategy=megatron, which cannot run a micro-batch in chunks"):
        engine.configure(TreeConfig(**option))


def test_no_check_of_log_probs(engine: Any) -> None:
    with pytest.raises(InvalidInputError, match="on_nonfinite=error with strategy=megatron"):
        engine.configure(TreeConfig(on_nonfinite="error"))
    engine.configure(TreeConfig(on_nonfinite="pass"))  # what happens anyway
    engine.configure(TreeConfig())


def test_no_diffusion(engine: Any) -> None:
    with pytest.raises(UnsupportedError, match="strategy=megatron"):
        engine.configure(None, object())


def test_switched_off_is_verls_own_path(engine: Any, folder: Path) -> None:
    engine.configure(None)
    data = mini_batch(Step(shape="turns"))
    found, expected = (inferred(one, data)["log_probs"].values() for one in (engine, build(Setup(), folder, False)))
    assert torch.equal(found, expected)


def test_workers_know_the_engine(engine: Any, folder: Path) -> None:
    """They hand their options to what is of the plugin."""
    assert isinstance(engine, TreePolicyEngine)
    assert not isinstance(build(Setup(), folder, tree=False), TreePolicyEngine)


def test_a_megatron_that_is_not_as_expected_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def check() -> None:
        raise UnsupportedError("GPTModel has no _preprocess")

    monkeypatch.setattr(install, "check_megatron_modules", check)
    theirs = ModuleType("theirs")
    with caplog.at_level("WARNING", logger="dta_plugin"):
        install._import_our_megatron_engine(theirs)
    assert "no trees with strategy=megatron: GPTModel has no _preprocess" in caplog.text
    assert not hasattr(theirs, "prepare_micro_batches")


def test_the_driver_takes_the_strategy(monkeypatch: pytest.MonkeyPatch) -> None:
    from omegaconf import OmegaConf
    from verl.trainer.ppo import utils

    monkeypatch.setattr(utils, "need_reference_policy", lambda _: True)
    part = {"strategy": "megatron"}
    config = OmegaConf.create({"actor_rollout_ref": {"actor": part, "ref": part, "rollout": {"custom": None}}})
    check_run(config)
    config.actor_rollout_ref.rollout.custom = {"dta": {"executor": "streamed"}}
    with pytest.raises(InvalidInputError, match="strategy=megatron"):
        check_run(config)
