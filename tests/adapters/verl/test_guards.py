"""What verl can be set to and a tree cannot follow: an error that names the setting, or verl's own path, said once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("verl", reason="verl is not installed: pip install 'dta-plugin[verl]'")

from tensordict import NonTensorStack, TensorDict
from verl.utils import tensordict_utils as tu

from dta_plugin.adapters.verl_plugin.engine import TreeEngine
from dta_plugin.config import TreeConfig
from dta_plugin.errors import InvalidInputError, UnsupportedError
from dta_plugin.execution import prepared_batch
from dta_plugin.models.introspection import causal_lm
from dta_plugin.models.layers import attention_modules
from tests.adapters.verl.support import Setup, Step, build, difference, log_probs, mini_batch, nested, train
from tests.support.dispatch import is_installed

DENSE = TreeConfig(on_unsupported="dense")


def _flag(name: str) -> Callable[[TensorDict], None]:
    return lambda data: tu.assign_non_tensor(data, **{name: True})


def _images(data: TensorDict) -> None:
    data["multi_modal_inputs"] = NonTensorStack(*[{"pixel_values": torch.zeros(1)} for _ in range(len(data))])


def _router_replay(data: TensorDict) -> None:
    data["routed_experts"] = torch.zeros(len(data), 1)


def _image_positions(data: TensorDict) -> None:
    data["position_ids"] = nested([torch.stack([row, row, row // 2, row]) for row in data["position_ids"].unbind()])


def _shifted(data: TensorDict) -> None:
    data["position_ids"] = nested([row + 1 for row in data["position_ids"].unbind()])


BATCHES: dict[str, tuple[Callable[[TensorDict], None], str]] = {
    "sum_pi_squared": (_flag("calculate_sum_pi_squared"), "calculate_sum_pi_squared=False"),
    "top_k": (_flag("distillation_use_topk"), "top-k distillation"),
    "distillation_only": (_flag("distillation_only"), "distillation"),
    "images": (_images, "no image token in its config"),
    "router_replay": (_router_replay, "routed_experts"),
    "mrope": (_image_positions, r"position ids \(multimodal, several rows of them\) of row 0 are not 0, 1, 2"),
    "positions": (_shifted, "position ids of row 0 are not 0, 1, 2"),
}

ENGINES: dict[str, tuple[Callable[[Any], None], str]] = {
    "ulysses": (lambda engine: setattr(engine, "use_ulysses_sp", True), "ulysses_sequence_parallel_size=1"),
    "qat": (lambda engine: setattr(engine, "_qat_enabled", True), "qat.enable=False"),
    "mtp": (
        lambda engine: object.__setattr__(engine.model_config.mtp, "enable_train", True),
        "mtp.enable_train=False",
    ),
    "offload": (
        lambda engine: object.__setattr__(engine.model_config, "enable_activation_offload", True),
        "enable_activation_offload=False",
    ),
    "linear_attention": (
        lambda engine: setattr(causal_lm(engine.module).config, "layer_types", ["linear_attention"] * 2),
        "full or sliding-window attention",
    ),
    "dropout": (
        lambda engine: setattr(attention_modules(causal_lm(engine.module))[0], "attention_dropout", 0.1),
        "attention_dropout=0",
    ),
}


@pytest.fixture(scope="module")
def engine(folder: Path) -> TreeEngine:
    return build(Setup(), folder, tree=True)


@pytest.mark.parametrize("name", BATCHES)
def test_batches_raise(name: str, engine: TreeEngine) -> None:
    change, message = BATCHES[name]
    engine.configure(TreeConfig())
    data = mini_batch(Step())
    change(data)
    with pytest.raises(UnsupportedError, match=message) as error:
        log_probs(engine, data)
    assert str(error.value).endswith("; or +actor_rollout_ref.rollout.custom.dta.on_unsupported=dense.")
    assert str(error.value).count("not exact here") == 1
    engine.configure_early(TreeConfig(), "dta")  # of an SFT command
    with pytest.raises(UnsupportedError, match=r"; or \+dta\.on_unsupported=dense\.$"):
        log_probs(engine, data)


@pytest.mark.parametrize("name", ENGINES)
def test_engines_raise(name: str, folder: Path) -> None:
    change, message = ENGINES[name]
    engine = build(Setup(), folder, tree=True)
    change(engine)
    with pytest.raises(UnsupportedError, match=message), engine.train_mode():
        engine.forward_backward_batch(mini_batch(Step()), None, forward_only=True)


def test_verls_own_path_is_verls_own(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The same engine goes from tree to dense and back; both equal stock verl, with its own attention."""
    engine, stock = (build(Setup(), folder, tree=tree) for tree in (True, False))
    settings = {"calculate_sum_pi_squared": True}
    steps = [Step(), Step(extra=settings, config=DENSE), Step(extra=settings, config=DENSE), Step()]
    with caplog.at_level("INFO", logger="dta_plugin"):
        found = train(engine, steps)
    expected = train(stock, steps)
    assert max(difference(a, b) for a, b in zip(found, expected, strict=True)) < 1e-5
    assert [step["dta"]["dta/dense_fallback"] for step in found] == [0, 1, 1, 0]
    assert found[1]["dta"]["dta/compression_ratio"] == 1
    assert caplog.text.count("verl's own path: calculate_sum_pi_squared") == 1


def test_rows_that_cannot_be_a_tree(engine: TreeEngine, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found for a micro-batch: an error by the name that the command has, or verl's own path."""
    stock = train(build(Setup(), folder, tree=False), [Step()])
    monkeypatch.setattr(prepared_batch, "length_obstacle", lambda *_: "rows of 9 tokens are scaled; use shorter ones")
    engine.configure(TreeConfig())
    with pytest.raises(UnsupportedError, match=r"here: rows of 9 tokens .*custom\.dta\.on_unsupported=dense\.$"):
        log_probs(engine, mini_batch(Step()))
    found = train(build(Setup(), folder, tree=True), [Step(config=DENSE)])
    assert difference(found[0], stock[0]) < 1e-5
    assert found[0]["dta"]["dta/dense_fallback"] == 1


def test_fallback_gives_the_attention_back(engine: TreeEngine) -> None:
    engine.configure(DENSE)
    log_probs(engine, mini_batch(Step()))
    assert is_installed(causal_lm(engine.module))
    log_probs(engine, mini_batch(Step(extra={"calculate_sum_pi_squared": True})))
    assert not is_installed(causal_lm(engine.module))


def test_a_layer_that_bypasses_the_tree(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Found only while running: an error, or verl's own path from there on."""
    engine, stock = (build(Setup(), folder, tree=tree) for tree in (True, False))
    layer = causal_lm(engine.module).model.layers[1].self_attn

    def bypassing(*args: Any, dta_tree: Any = None, **kwargs: Any) -> Any:
        if dta_tree is not None:
            kwargs["attention_mask"] = None  # which carries the tree, too
        return type(layer).forward(layer, *args, **kwargs)

    monkeypatch.setattr(layer, "forward", bypassing)
    with pytest.raises(UnsupportedError, match="did not use the tree"):
        train(engine, [Step()])
    with caplog.at_level("INFO", logger="dta_plugin"):
        found = train(engine, [Step(config=DENSE)])
    assert difference(found[0], train(stock, [Step()])[0]) < 1e-5
    assert "did not use the tree" in caplog.text


def test_gate(engine: TreeEngine, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="dta_plugin"):
        (found,) = train(engine, [Step(config=TreeConfig(min_saving=0.95))])
    assert found["dta"]["dta/dense_fallback"] == 1
    assert "min_saving 95%" in caplog.text


def test_switched_off_is_stock(engine: TreeEngine) -> None:
    engine.configure(None)
    calls = engine._dta_calls
    log_probs(engine, mini_batch(Step()))
    assert engine._dta_calls == calls


@pytest.mark.parametrize("options", [{"executor": "streamed"}, {"max_tree_tokens_per_chunk": 64}])
def test_fsdp1_cannot_run_in_chunks(options: dict[str, Any], folder: Path) -> None:
    engine = build(Setup("fsdp"), folder, tree=True)
    with pytest.raises(InvalidInputError, match="strategy=fsdp2"):
        engine.configure(TreeConfig(**options))


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
def test_reference_engine(strategy: str, folder: Path) -> None:
    """forward_only: verl offloads its parameters."""
    stock, tree = (build(Setup(strategy, forward_only=True), folder, tree=tree) for tree in (False, True))
    data = mini_batch(Step(shape="turns"))
    a, b = (log_probs(x, data.copy())["log_probs"].unbind() for x in (stock, tree))
    begins = data["prompts"].offsets().diff().tolist()
    assert max((x - y)[begin - 1 : -1].abs().max() for x, y, begin in zip(a, b, begins, strict=True)) < 1e-5
    assert all((y[: begin - 1] == 0).all() for y, begin in zip(b, begins, strict=True))


REMEDIES = {
    "fsdp": r"cannot be streamed: a model that FSDP1 shards.*Use smaller",
    "fsdp2": "max_tree_tokens_per_chunk",
}


@pytest.mark.parametrize("strategy", REMEDIES)
def test_a_backward_pass_without_memory_names_the_remedy(strategy: str, folder: Path) -> None:
    def no_memory(_: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def hook(_: torch.nn.Module, __: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(no_memory)

    engine = build(Setup(strategy, checkpointing=False), folder, tree=True)
    causal_lm(engine.module).model.norm.register_forward_hook(hook)
    with pytest.raises(torch.OutOfMemoryError, match=f"^Out of memory backward.*{REMEDIES[strategy]}"):
        train(engine, [Step()])
