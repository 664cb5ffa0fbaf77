"""Checkpoints in the formats of released diffusion LMs against forward passes written out from their architectures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen3Config

from dta_plugin.diffusion import DiffusionFamily, predictions
from dta_plugin.diffusion.families import family_of
from dta_plugin.diffusion.formats import native_config
from dta_plugin.diffusion.loading import load_diffusion_lm, save_diffusion_lm
from dta_plugin.diffusion.native import bidirectional
from dta_plugin.errors import InvalidInputError, UnsupportedError
from tests.support.diffusion_checkpoints import (
    FAMILIES,
    State,
    released_config,
    released_logits,
    released_state,
    write_checkpoint,
)
from tests.support.tiny_diffusion import diffusion_model, padded

TOLERANCE = 1e-5
# 11 tokens: two whole blocks of SDAR and a part of one; some masked, some repeated.
IDS = torch.tensor([7, 50, 12, 3, 50, 50, 41, 7, 9, 50, 22])


def expected_predictions(config: dict[str, Any], state: State, ids: torch.Tensor) -> torch.Tensor:
    """[S, V] from the written-out model: row i for token i; Dream's model gives it at i - 1."""
    logits = released_logits(config, state, ids)
    return torch.cat([logits[:1], logits[:-1]]) if config["model_type"] == "Dream" else logits


def gap(model: PreTrainedModel, family: DiffusionFamily, config: dict[str, Any], state: State) -> float:
    with torch.no_grad():
        given = predictions(model, family, IDS[None])[0]
    return (given - expected_predictions(config, state, IDS)).abs().max().item()


def loaded(directory: Path, config: dict[str, Any], state: State, shards: int = 1) -> PreTrainedModel:
    return load_diffusion_lm(write_checkpoint(directory, config, state, shards))


def made(
    directory: Path, family: str, shards: int = 1, **changes: Any
) -> tuple[PreTrainedModel, dict[str, Any], State]:
    """A checkpoint of the family, loaded; its own config and state."""
    config = released_config(family, **changes)
    state = released_state(config)
    return loaded(directory, config, state, shards), config, state


def tensors(directory: Path) -> dict[str, tuple[torch.dtype, bytes]]:
    found = {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}
    return {name: (tensor.dtype, tensor.view(torch.uint8).numpy().tobytes()) for name, tensor in found.items()}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_released_checkpoint_gives_the_logits_of_its_own_model(tmp_path: Path, family: str, shards: int) -> None:
    model, config, state = made(tmp_path, family, shards)
    assert gap(model, family_of(model.config), config, state) < TOLERANCE


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_rows_give_what_each_row_gives_alone(tmp_path: Path, family: str, left: bool) -> None:
    model, config, state = made(tmp_path, family)
    rows = [IDS.tolist(), IDS[:6].tolist(), IDS[3:5].tolist()]
    ids, mask = padded(rows, left)
    with torch.no_grad():
        given = predictions(model, family_of(model.config), ids, mask)
    for i, row in enumerate(rows):
        expected = expected_predictions(config, state, torch.tensor(row))
        first = 1 if config["model_type"] == "Dream" else 0  # no logits before the first token
        assert (given[i][mask[i].bool()] - expected)[first:].abs().max() < TOLERANCE


@pytest.mark.parametrize(
    "family, changes",
    [
        ("llada", {"weight_tying": True}),
        ("llada", {"n_kv_heads": 2}),
        ("llada", {"n_kv_heads": None, "mlp_hidden_size": None, "mlp_ratio": 2}),
        ("illada", {"tie_word_embeddings": False}),
        ("dream", {"tie_word_embeddings": True}),
        ("sdar", {"tie_word_embeddings": True, "block_size": 3}),
        ("a2d", {"tie_word_embeddings": True, "head_dim": 6}),
    ],
)
def test_tied_heads_grouped_heads_and_other_sizes(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    model, config, state = made(tmp_path, family, **changes)
    assert gap(model, family_of(model.config), config, state) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_the_wrong_shift_and_a_causal_mask_are_noticed(tmp_path: Path, family: str) -> None:
    model, config, state = made(tmp_path, family)
    right = family_of(model.config)
    for wrong in (replace(right, is_shifted=not right.is_shifted), replace(right, block_length=1)):
        assert gap(model, wrong, config, state) > 1e-2


def test_full_attention_and_other_blocks_are_not_those_of_sdar(tmp_path: Path) -> None:
    model, config, state = made(tmp_path, "sdar")
    right = family_of(model.config)
    assert right.block_length == 4
    for block_length in (None, 3, 8):
        assert gap(model, replace(right, block_length=block_length), config, state) > 1e-2


@pytest.mark.parametrize(
    "family, gate, up",
    [
        ("llada", "model.transformer.blocks.{}.ff_proj.weight", "model.transformer.blocks.{}.up_proj.weight"),
        ("dream", "model.layers.{}.mlp.gate_proj.weight", "model.layers.{}.mlp.up_proj.weight"),
        ("sdar", "model.layers.{}.mlp.gate_proj.weight", "model.layers.{}.mlp.up_proj.weight"),
    ],
)
def test_swapped_gates_are_noticed(tmp_path: Path, family: str, gate: str, up: str) -> None:
    config = released_config(family)
    state = released_state(config)
    swapped = dict(state)
    for i in range(2):
        swapped[gate.format(i)], swapped[up.format(i)] = state[up.format(i)], state[gate.format(i)]
    model = loaded(tmp_path, config, swapped)
    assert gap(model, family_of(model.config), config, state) > 1e-2


@pytest.mark.parametrize("changes", [{"rope_theta": 10000.0}, {"rms_norm_eps": 1e-6}])
@pytest.mark.parametrize("family", FAMILIES)
def test_rotary_base_and_norm_epsilon_are_the_checkpoints(
    tmp_path: Path, family: str, changes: dict[str, float]
) -> None:
    config = released_config(family)
    state = released_state(config)
    model = loaded(tmp_path, config | changes, state)
    assert gap(model, family_of(model.config), config | changes, state) < TOLERANCE
    assert gap(model, family_of(model.config), config, state) > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_saving_gives_back_every_byte_name_and_entry(
    tmp_path: Path, family: str, shards: int, dtype: torch.dtype
) -> None:
    config = released_config(family)
    if "torch_dtype" in config:
        config["torch_dtype"] = str(dtype).removeprefix("torch.")
    source = write_checkpoint(tmp_path / "in", config, released_state(config, dtype), shards)
    (source / "tokenizer.json").write_text("{}")
    model = load_diffusion_lm(source)
    assert model.dtype == dtype
    save_diffusion_lm(model, tmp_path / "out", source=source, max_shard_size="5GB" if shards == 1 else "8KB")
    assert tensors(tmp_path / "out") == tensors(source)
    assert (tmp_path / "out" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    if shards == 1:
        assert (tmp_path / "out" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trained_model_comes_back_from_both_ways_of_saving(tmp_path: Path, family: str) -> None:
    config = released_config(family)
    model = loaded(tmp_path / "in", config, released_state(config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    save_diffusion_lm(model, tmp_path / "released")
    model.save_pretrained(tmp_path / "native")
    trained = model.state_dict()
    for directory in (tmp_path / "released", tmp_path / "native"):
        again = load_diffusion_lm(directory)
        assert again.state_dict().keys() == trained.keys()
        assert all(torch.equal(again.state_dict()[name], trained[name]) for name in trained)
        assert replace(family_of(again.config), name="") == replace(family_of(model.config), name="")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    assert plain.config.is_causal is False and family_of(plain.config) == family_of(model.config)
    assert tensors(tmp_path / "released") != tensors(tmp_path / "in")


def test_decoders_made_bidirectional_are_read_by_the_same_call(tmp_path: Path) -> None:
    made = diffusion_model()
    made.config = bidirectional(made.config, mask_token_id=31)
    made.save_pretrained(tmp_path)
    model = load_diffusion_lm(tmp_path)
    assert family_of(model.config).mask_token_id == 31 and model.config.is_causal is False
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in made.state_dict().items())


@pytest.mark.parametrize(
    "kind, config",
    [
        ("a2d-qwen3", Qwen3Config(hidden_size=24, num_hidden_layers=2, rope_theta=7.0, tie_word_embeddings=True)),
        ("a2d-llama", LlamaConfig(hidden_size=32, num_hidden_layers=2, attention_bias=True, mlp_bias=True)),
    ],
)
def test_a2d_configs_as_transformers_writes_them_are_those_of_their_base(
    kind: str, config: Qwen3Config | LlamaConfig
) -> None:
    native = native_config(config.to_dict() | {"model_type": kind, "architectures": ["A2D"]})
    own = {"original_config", "is_causal", "use_cache", "architectures", "transformers_version"}
    assert {k: v for k, v in native.to_dict().items() if k not in own} == {
        k: v for k, v in config.to_dict().items() if k not in own
    }


def test_the_end_token_of_llada_is_trained_though_it_is_the_pad_token(tmp_path: Path) -> None:
    config = released_config("llada")
    model = loaded(tmp_path, config, released_state(config))
    model(input_ids=IDS[None]).logits.square().sum().backward()
    gradient = model.get_input_embeddings().weight.grad
    assert gradient is not None and gradient[config["pad_token_id"]].abs().max() > 0


def test_options_reach_from_pretrained(tmp_path: Path) -> None:
    config = released_config("dream")
    write_checkpoint(tmp_path, config, released_state(config))
    model = load_diffusion_lm(tmp_path, dtype=torch.bfloat16, attn_implementation="eager")
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "eager"
    assert model.config._name_or_path == str(tmp_path)


def test_a_repository_is_fetched_with_the_options_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = released_config("llada")
    write_checkpoint(tmp_path, config, released_state(config))
    asked: dict[str, Any] = {}

    def snapshot_download(repository: str, **options: Any) -> str:
        asked.update(options, repository=repository)
        return str(tmp_path)

    monkeypatch.setattr("dta_plugin.diffusion.loading.snapshot_download", snapshot_download)
    model = load_diffusion_lm("GSAI-ML/LLaDA-8B-Instruct", revision="main", dtype=torch.bfloat16)
    assert asked["repository"] == "GSAI-ML/LLaDA-8B-Instruct" and asked["revision"] == "main"
    assert not any(pattern.endswith(".py") for pattern in asked["allow_patterns"])
    assert model.dtype == torch.bfloat16 and model.config._name_or_path == "GSAI-ML/LLaDA-8B-Instruct"


@pytest.mark.parametrize("path", ["runs/mistyped/model", "GSAI-ML/LLaDa-8B", "./nothing"])
def test_a_mistyped_path_is_named(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too deep for a repository, one that the hub does not find, and no path at all."""
    if path.count("/") == 1:

        def snapshot_download(repository: str, **_: Any) -> str:
            raise LocalEntryNotFoundError(f"{repository} is not there.")

        monkeypatch.setattr("dta_plugin.diffusion.loading.snapshot_download", snapshot_download)
    with pytest.raises(InvalidInputError, match=f"Got the model '{path}'. Expected a directory.*Look at the spelling"):
        load_diffusion_lm(path)


def test_a_folder_without_a_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=f"{tmp_path} has no config.json"):
        load_diffusion_lm(tmp_path)


def test_a_missing_parameter_is_named_as_in_the_checkpoint(tmp_path: Path) -> None:
    config = released_config("llada")
    state = released_state(config)
    del state["model.transformer.blocks.1.ff_proj.weight"]
    with pytest.raises(InvalidInputError, match=r"missing: model\.transformer\.blocks\.1\.ff_proj\.weight"):
        loaded(tmp_path, config, state)


def test_a_parameter_without_a_place_is_named(tmp_path: Path) -> None:
    config = released_config("dream")
    state = released_state(config) | {"model.layers.0.self_attn.o_proj.bias": torch.zeros(24)}
    with pytest.raises(InvalidInputError, match=r"not expected: model\.layers\.0\.self_attn\.o_proj\.bias"):
        loaded(tmp_path, config, state)


def test_a_parameter_of_another_shape_is_named(tmp_path: Path) -> None:
    config = released_config("llada")
    state = released_state(config)
    with pytest.raises(InvalidInputError, match=r"of another shape: model\.transformer\.blocks\.0\.k_proj\.weight"):
        loaded(tmp_path, config | {"n_kv_heads": 2}, state)


def test_an_index_that_names_the_wrong_shard_is_an_error(tmp_path: Path) -> None:
    config = released_config("sdar")
    write_checkpoint(tmp_path, config, released_state(config), shards=2)
    index = tmp_path / "model.safetensors.index.json"
    entries = json.loads(index.read_text())
    entries["weight_map"]["model.norm.weight"] = "model-00001-of-00002.safetensors"
    entries["weight_map"]["lm_head.weight"] = "model-00002-of-00002.safetensors"
    index.write_text(json.dumps(entries))
    with pytest.raises(InvalidInputError, match=r"model\.norm\.weight|lm_head\.weight"):
        load_diffusion_lm(tmp_path)


def test_weights_that_are_not_safetensors_are_an_error(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, released_config("dream"), released_state(released_config("dream")))
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(InvalidInputError, match="safetensors"):
        load_diffusion_lm(tmp_path)


def test_tied_weights_with_a_head_of_their_own_are_an_error(tmp_path: Path) -> None:
    config = released_config("illada")
    state = released_state(config)
    head = state["model.embed_tokens.weight"].clone()
    model = loaded(tmp_path / "equal", config, state | {"lm_head.weight": head})
    assert gap(model, family_of(model.config), config, state) < TOLERANCE
    with pytest.raises(InvalidInputError, match="LM head"):
        loaded(tmp_path / "other", config, state | {"lm_head.weight": head + 1})


@pytest.mark.parametrize(
    "changes",
    [
        {"block_type": "sequential"},
        {"activation_type": "swiglu"},
        {"layer_norm_type": "default"},
        {"attention_layer_norm": True},
        {"input_emb_norm": True},
        {"scale_logits": True},
        {"include_bias": True},
        {"include_qkv_bias": True},
        {"bias_for_layer_norm": True},
        {"rope": False},
        {"alibi": True},
        {"multi_query_attention": True},
        {"block_group_size": 2},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_llada_that_is_not_a_llama_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = released_config("llada")
    state = released_state(config)
    with pytest.raises(UnsupportedError, match=rf"{next(iter(changes))}=.*4\.57\.1"):
        loaded(tmp_path, config | changes, state)


def test_scaled_rotary_embeddings_are_refused(tmp_path: Path) -> None:
    config = released_config("dream", rope_scaling={"rope_type": "yarn", "factor": 4.0})
    with pytest.raises(UnsupportedError, match="rope_scaling"):
        loaded(tmp_path, config, released_state(config))


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "llada", "architectures": ["LLaDAMoEModelLM"]},
        {"model_type": "llada2_moe", "architectures": ["LLaDA2MoeModelLM"]},
        {"model_type": "sdar_moe", "architectures": ["SDARMoeForCausalLM"]},
        {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]},
    ],
    ids=lambda changes: changes["architectures"][0],
)
def test_other_checkpoints_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = released_config("sdar", **changes)
    write_checkpoint(tmp_path, config, released_state(released_config("sdar")))
    with pytest.raises(UnsupportedError, match=changes["architectures"][0]):
        load_diffusion_lm(tmp_path)


def test_a_config_without_an_entry_that_is_needed_names_it(tmp_path: Path) -> None:
    config = released_config("dream")
    state = released_state(config)
    del config["rope_theta"]
    with pytest.raises(InvalidInputError, match="rope_theta"):
        loaded(tmp_path, config, state)


def test_only_models_that_were_loaded_so_are_saved_so(tmp_path: Path) -> None:
    config = released_config("dream")
    model = loaded(tmp_path / "in", config, released_state(config))
    model.resize_token_embeddings(64)
    with pytest.raises(InvalidInputError, match=r"another shape: model\.embed_tokens\.weight"):
        save_diffusion_lm(model, tmp_path / "out")
    del model.config.original_config
    with pytest.raises(InvalidInputError, match="save_pretrained"):
        save_diffusion_lm(model, tmp_path / "out")
