"""Released diffusion LMs as decoders of the installed transformers, and back.

    model = load_diffusion_lm("GSAI-ML/LLaDA-8B-Instruct", dtype="bfloat16")
    family = family_of(model.config)
    ...                                                        # train it
    save_diffusion_lm(model, "out", source="path/of/the/checkpoint")

Nothing that a checkpoint ships is executed: its config and its safetensors are translated (`formats`), and every
parameter must find its place. What is saved has the checkpoint's own names and config again, for its own code and for
servers that know the family; `model.save_pretrained` instead writes a checkpoint of the native decoder, which
`load_diffusion_lm` reads, too.

One thing differs: transformers applies rotary embeddings in the model's dtype, LLaDA's own code in float32
(`rope_full_precision`). In float32 the logits are the same; in bfloat16 they differ by its rounding.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from dta_plugin.diffusion.families import ORIGINAL_CONFIG
from dta_plugin.diffusion.formats import native_config, native_name, original_name
from dta_plugin.errors import InvalidInputError

_HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only", "force_download")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_LISTED = 6  # names that a message lists


def load_diffusion_lm(path_or_id: str | PathLike[str], **options: Any) -> PreTrainedModel:
    """A LLaDA, iLLaDA, Dream, SDAR or A2D checkpoint as a native decoder that attends in both directions.

    path_or_id: a directory with a config.json and safetensors, or a repository of the model hub; what transformers has
    saved of such a decoder, or of one made `bidirectional`, is read as well. options: those of
    `from_pretrained` (dtype, device_map, attn_implementation, quantization_config, revision, token, ...). The dtype is
    the checkpoint's where none is given. `family_of(model.config)` says how the model is asked.

    Raises InvalidInputError where there is no such directory or repository, UnsupportedError for other families and
    settings (`formats.native_config`), InvalidInputError, with the names, if a parameter is missing, left over or of
    another shape.
    """
    hub = {name: options.pop(name) for name in _HUB_OPTIONS if name in options}
    directory = checkpoint_directory(path_or_id, **hub)
    entries = json.loads((directory / "config.json").read_text())
    model: PreTrainedModel
    if ORIGINAL_CONFIG in entries or "diffusion" in entries:  # saved by transformers, with the native names
        model = AutoModelForCausalLM.from_pretrained(directory, **options)
    else:
        config = native_config(entries)
        state = {native_name(entries, name): tensor for name, tensor in _read_weights(directory).items()}
        skeleton = _check_parameters(config, state)
        options.setdefault("dtype", config.dtype or "auto")
        model = type(skeleton).from_pretrained(None, config=config, state_dict=state, **options)
    model.config.name_or_path = model.name_or_path = str(path_or_id)
    return model


def checkpoint_directory(path_or_id: str | PathLike[str], **hub: Any) -> Path:
    """The directory of a checkpoint, downloaded where path_or_id is a repository; hub: options of the download.

    Raises InvalidInputError where there is neither, or no config.json in it.
    """
    directory = Path(path_or_id)
    if not directory.is_dir():
        try:
            directory = Path(snapshot_download(str(path_or_id), allow_patterns=["*.json", "*.safetensors"], **hub))
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
            raise no_model(path_or_id, error) from error
    if not (directory / "config.json").is_file():
        raise InvalidInputError(
            f"{directory} has no config.json. Expected the directory of a checkpoint, with its config and safetensors; "
            "give the folder that holds them."
        )
    return directory


def no_model(path_or_id: str | PathLike[str], error: Exception) -> InvalidInputError:
    """What to raise for a path that is no model; error: of the model hub."""
    return InvalidInputError(
        f"Got the model {str(path_or_id)!r}. Expected a directory with a checkpoint, which there is not here (from "
        f"{Path.cwd()}), or a repository of the model hub, where looking for it ended in {type(error).__name__}: "
        f"{str(error).splitlines()[0]} Look at the spelling, or download the model first."
    )


def save_diffusion_lm(
    model: PreTrainedModel,
    directory: str | PathLike[str],
    *,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    source: str | PathLike[str] | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write a model from `load_diffusion_lm` with the names and the config of the checkpoint it came from.

    state_dict: the weights, where the model itself does not hold them whole (FSDP, ZeRO); names as in
    `model.state_dict()`. source: a directory whose other files (tokenizer, Python files) are copied; without it only
    config.json and the weights are written. An adapter (LoRA) must be merged first.

    Raises InvalidInputError if the model was not loaded so, or if its parameters are no longer those of the checkpoint.
    """
    original = getattr(model.config, ORIGINAL_CONFIG, None)
    if original is None:
        raise InvalidInputError(
            f"{type(model).__name__} has no {ORIGINAL_CONFIG!r} entry in its config. Expected a model from "
            "load_diffusion_lm; use model.save_pretrained for others."
        )
    config = native_config(original)
    state = dict(model.state_dict() if state_dict is None else state_dict)
    _check_parameters(config, state)

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    renamed = {original_name(original, name): tensor for name, tensor in state.items()}
    save_torch_state_dict(renamed, directory, max_shard_size=max_shard_size, metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(_with_dtype(original, state), indent=2) + "\n")
    if source is not None:
        _copy_other_files(Path(source), directory)


def _read_weights(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of the safetensors of a directory, mapped into memory; with an index, those that it lists."""
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        single = directory / "model.safetensors"
        if not single.is_file():
            raise InvalidInputError(
                f"{directory} has neither model.safetensors nor its index. Expected weights in safetensors; convert "
                "others with the family's own code and save_pretrained."
            )
        return load_file(single)
    weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
    shards = {shard: load_file(directory / shard) for shard in sorted(set(weight_map.values()))}
    lost = [name for name, shard in weight_map.items() if name not in shards[shard]]
    if lost:
        raise InvalidInputError(
            f"{index} lists {_listed(lost)}, but the shards it names do not have them. Expected the files of one "
            "release; download them again."
        )
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def _check_parameters(config: PretrainedConfig, state: dict[str, torch.Tensor]) -> PreTrainedModel:
    """An empty model of the config, after checking that the weights are exactly its parameters.

    A tied LM head is taken out of the weights, and must be the embedding.
    """
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    expected = {name: tensor.shape for name, tensor in skeleton.state_dict().items()}
    if config.tie_word_embeddings:
        expected.pop(_HEAD)
        _drop_head(state)
    wrong = {
        "missing": [name for name in expected if name not in state],
        "not expected": [name for name in state if name not in expected],
        "of another shape": [name for name, shape in expected.items() if name in state and state[name].shape != shape],
    }
    if any(wrong.values()):
        original = getattr(config, ORIGINAL_CONFIG)
        found = [
            f"{what}: {_listed(original_name(original, n) for n in names)}" for what, names in wrong.items() if names
        ]
        raise InvalidInputError(
            f"The weights are not those of this {original['model_type']} model. Parameters {'; '.join(found)}. "
            f"Expected exactly the {len(expected)} of its config; look at config.json, and merge adapters."
        )
    return skeleton


def _drop_head(state: dict[str, torch.Tensor]) -> None:
    head, embedding = state.pop(_HEAD, None), state.get(_EMBEDDING)
    if head is not None and embedding is not None and not torch.equal(head, embedding):
        raise InvalidInputError(
            "The weights hold an LM head that is not the embedding, and the config ties the two. Expected equal "
            "weights, or a config that says they are not tied."
        )


def _listed(names: Iterable[str]) -> str:
    listed = list(names)
    more = "" if len(listed) <= _LISTED else f" and {len(listed) - _LISTED} more"
    return ", ".join(listed[:_LISTED]) + more


def _with_dtype(original: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The checkpoint's config entries, with the dtype of the weights where it names one."""
    dtype = str(next(iter(state.values())).dtype).removeprefix("torch.")
    return {name: dtype if name in ("dtype", "torch_dtype") else value for name, value in original.items()}


def _copy_other_files(source: Path, directory: Path) -> None:
    for file in sorted(source.iterdir()):
        is_weights = file.suffix in (".safetensors", ".bin") or file.name.endswith(".index.json")
        if file.is_file() and not is_weights and file.name != "config.json":
            shutil.copy2(file, directory / file.name)
