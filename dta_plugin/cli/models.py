"""A model named on the command line -> its architecture, without its weights, and what a forward pass costs."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dta_plugin.errors import InvalidInputError
from dta_plugin.tree.cost import ModelCost

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
                raise InvalidInputError(
                    f"--geometry has {item!r}. Expected SIZE=NUMBER with SIZE in {', '.join(known)}."
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
        reason = str(error).strip().splitlines()[0]
        raise InvalidInputError(
            f"No model configuration could be loaded from {path!r}: {reason} {_EXPECTED}"
        ) from error


def skeleton(path: str) -> PreTrainedModel:
    """The causal LM on the meta device: every layer and shape, no weights, no memory."""
    import torch
    from transformers import AutoModelForCausalLM

    config = load_config(path)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise InvalidInputError(
            f"{path!r} is a {config.model_type!r} model, which transformers cannot build as a causal LM. Expected a "
            "decoder-only language model."
        ) from error


def cost_of(model: str | None, geometry: str | None) -> tuple[ModelCost, str]:
    """(cost, its description) of a model on disk, of sizes given by hand, or of Qwen3-0.6B."""
    if model is not None and geometry is not None:
        raise InvalidInputError("Got --model and --geometry. Expected one of them: both say what a token costs.")
    if model is not None:
        from dta_plugin.execution.model import model_cost

        return model_cost(skeleton(model)), model
    if geometry is not None:
        return Geometry.parse(geometry).cost(), f"a model with {geometry}"
    return Geometry().cost(), "Qwen3-0.6B"
