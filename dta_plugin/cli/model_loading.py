"""A model named on the command line: loaded, or its architecture without weights, and what a forward pass costs."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dta_plugin.cli.terminal import reason, waiting
from dta_plugin.errors import InvalidInputError, did_you_mean
from dta_plugin.tree.cost import ModelCost

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

_POINTER = b"version https://git-lfs"
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_EXPECTED = "Expected a folder with a config.json, a config.json, or a model name of the Hugging Face hub."


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes that decide what a dense, gated decoder costs. The defaults are Qwen3-0.6B's."""

    hidden: int = 1024
    layers: int = 28
    heads: int = 16
    kv_heads: int = 8
    head_dim: int = 128
    intermediate: int = 3072
    vocab: int = 151936

    @classmethod
    def parse(cls, text: str) -> Geometry:
        """Read "layers=36,hidden=2560"; what is not named keeps its default."""
        known = [field.name for field in fields(cls)]
        sizes: dict[str, int] = {}
        for item in text.split(","):
            name, _, value = item.partition("=")
            if name.strip() not in known or not value.strip().isdigit() or int(value) < 1:
                hint = "" if name.strip() in known else did_you_mean(name.strip(), known)
                raise InvalidInputError(
                    f"--geometry has {item!r}.{hint} Expected SIZE=NUMBER with SIZE in {', '.join(known)}."
                )
            sizes[name.strip()] = int(value)
        return replace(cls(), **sizes)

    def cost(self) -> ModelCost:
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)  # q, o and k, v
        return ModelCost(
            per_token=2.0 * self.layers * (attention + 3 * self.hidden * self.intermediate),
            per_pair=4.0 * self.layers * self.heads * self.head_dim,
            per_scored=2.0 * self.hidden * self.vocab,
        )


def check_exists(path: str, expected: str) -> None:
    """Raise InvalidInputError for what is clearly a path, no hub name, and does not exist."""
    if not Path(path).exists() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise InvalidInputError(f"{path!r} does not exist. {expected}")


def load_config(path: str) -> Any:
    """The model's configuration; `path` is a folder, a config.json or a hub name."""
    from transformers import AutoConfig
    from transformers.utils import logging

    check_exists(path, _EXPECTED)
    logging.set_verbosity_error()  # the report is the command's to make
    logging.disable_progress_bar()
    try:
        return AutoConfig.from_pretrained(path)
    except Exception as error:
        raise InvalidInputError(
            f"No model configuration could be loaded from {path!r}: {reason(error)} {_EXPECTED}"
        ) from error


def auto_class(config: Any) -> Any:
    """Which of transformers' classes for any family builds such models as they are trained: with images, or text."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    with_images: Any = AutoModelForImageTextToText._model_mapping
    text: Any = AutoModelForCausalLM._model_mapping
    if type(config) not in with_images:
        return AutoModelForCausalLM
    is_named = with_images[type(config)].__name__ in (getattr(config, "architectures", None) or [])
    return AutoModelForImageTextToText if is_named or type(config) not in text else AutoModelForCausalLM


def skeleton(path: str) -> PreTrainedModel:
    """The causal LM on the meta device: every layer and shape, no weights, no memory."""
    import torch

    config = load_config(path)
    _check_heads(config, path)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = auto_class(config).from_config(config)
            return model
    except Exception as error:  # whatever a model class raises for a config that it was not made for
        raise InvalidInputError(
            f"{path!r} is a {config.model_type!r} model, which transformers cannot build as a causal LM. Expected a "
            f"decoder-only language model ({type(error).__name__}: {reason(error)})."
        ) from error


def device_named(name: str | None) -> torch.device:
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InvalidInputError(
            f"--device {name}: {reason(error)}. Expected a device of this machine, such as cpu."
        ) from error
    return device


def load_model(path: str, dtype: torch.dtype | None, device: torch.device) -> tuple[PreTrainedModel, str]:
    """(model, "its weights" or "random weights"): a config.json, or a folder without weights, has random ones."""
    import torch

    config = load_config(path)
    _check_heads(config, path)
    kind = auto_class(config)
    folder = Path(path)
    loaded: dict[str, Any] = {}
    is_random = folder.is_file() or (folder.is_dir() and not _has_weights(folder))
    try:
        with waiting(f"loading {path}"):
            if is_random:
                torch.manual_seed(0)
                model = kind.from_config(config, dtype=dtype)
            else:
                _check_pointers(folder)
                found: Any = kind.from_pretrained(path, dtype=dtype, output_loading_info=True)
                model, loaded = found
            module: nn.Module = model
            module.to(device)
    except InvalidInputError:
        raise
    except Exception as error:  # damaged files, other shapes, no memory: every library raises its own
        raise InvalidInputError(
            f"{path!r} cannot be loaded as a causal LM: {type(error).__name__}: {reason(error)}"
        ) from error
    if missing := sorted(loaded.get("missing_keys", ())):
        raise InvalidInputError(
            f"{path!r} lacks {len(missing)} weights of a {type(model).__name__}, such as {missing[0]}. Expected "
            "all; for random weights give its config.json."
        )
    return model, "random weights" if is_random else "its weights"


def _check_heads(config: Any, path: str) -> None:
    """Raise InvalidInputError for attention heads that cannot share keys evenly."""
    text = config.get_text_config(decoder=True)
    heads, shared = getattr(text, "num_attention_heads", None), getattr(text, "num_key_value_heads", None)
    if isinstance(heads, int) and isinstance(shared, int) and shared > 0 and heads % shared:
        raise InvalidInputError(
            f"{path!r} has num_attention_heads={heads} and num_key_value_heads={shared}. The former "
            "has to be a multiple of the latter."
        )


def _check_pointers(folder: Path) -> None:
    for pattern in _WEIGHTS:
        for file in folder.glob(pattern):
            with file.open("rb") as stream:
                if stream.read(len(_POINTER)) == _POINTER:
                    raise InvalidInputError(f"{file} is a git-lfs pointer, not the weights. Run: git lfs pull")


def _has_weights(folder: Path) -> bool:
    return any(next(folder.glob(pattern), None) for pattern in _WEIGHTS)


def fits_in_memory(path: str) -> bool:
    """Whether a folder has weights that take at most a quarter of this machine's memory."""
    import torch

    from dta_plugin.execution.memory import free_bytes

    if not _has_weights(Path(path)):
        return False
    size = sum(file.stat().st_size for pattern in _WEIGHTS for file in Path(path).glob(pattern))
    return size <= free_bytes(torch.device("cpu")) // 4


def add_lora(model: PreTrainedModel) -> nn.Module:
    """Random LoRA adapters: with PEFT's usual zeros in B, half of the gradients would vanish."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise InvalidInputError("--lora needs peft, which is not installed. Run: pip install peft") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # between peft and transformers; nothing a user can act on
        return get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False))


def cost_of(model: str | None, geometry: str | None) -> tuple[ModelCost, str]:
    """(cost, its description) of a model on disk, of sizes given by hand, or of Qwen3-0.6B."""
    if model is not None and geometry is not None:
        raise InvalidInputError("Got --model and --geometry. Expected one of them: both say what a token costs.")
    if model is not None:
        from dta_plugin.models.introspection import model_cost

        return model_cost(skeleton(model)), model
    if geometry is not None:
        return Geometry.parse(geometry).cost(), f"a model with {geometry}"
    return Geometry().cost(), "Qwen3-0.6B"
