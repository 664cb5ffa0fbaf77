"""What `dta calibrate` measured, kept per machine and model: how fast trees and dense batches run here.

A calibration is a small JSON file in the assets folder of the Hugging Face cache (or wherever the user put it). It is
found again by what decides speed: the model's class and sizes, dtype, autocast, checkpointing, what is trained, the
device, the number of CPU threads, torch. Without one, decisions go by FLOPs.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import platform
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from huggingface_hub import cached_assets_path
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from dta_plugin.config import TreeConfig
from dta_plugin.errors import InvalidInputError
from dta_plugin.execution.ranks import gathered, is_collective
from dta_plugin.models.introspection import causal_lm, input_device, is_checkpointed, model_cost
from dta_plugin.models.layers import one_size
from dta_plugin.tree.cost import ModelCost
from dta_plugin.tree.time_model import SecondsPerFlop

logger = logging.getLogger("dta_plugin")

# A call costs about as much as this many tokens where nothing was measured: 55 on x86 with one thread.
_CALL_TOKENS = 64
_SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "sliding_window",
)


@dataclass(frozen=True, slots=True)
class Calibration:
    """tree, dense: measured speeds. dense_path: what "dense" was. error: largest relative error of a prediction.

    about: the machine and model, see `describe`.
    """

    tree: SecondsPerFlop
    dense: SecondsPerFlop
    dense_path: str
    error: float
    about: dict[str, Any]

    def save(self, path: Path | None = None) -> Path:
        """Write to `path`, or to where `find` looks. Raises InvalidInputError where that cannot be written."""
        try:
            path = path or _cache_file(self.about)
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, json.dumps(asdict(self), indent=2) + "\n")
        except OSError as error:
            raise InvalidInputError(
                f"The calibration cannot be written: {error}. Give a file with --output, and to training as "
                "calibration=FILE."
            ) from error
        return path

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Raises InvalidInputError for a file that is missing or not a calibration."""
        try:
            return cls._checked(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise InvalidInputError(
                f"calibration={str(path)!r} cannot be read: {error}. Expected auto, off, or a file that `dta calibrate "
                "--output` wrote."
            ) from error

    @classmethod
    def _checked(cls, fields: Any) -> Calibration:
        """Raises ValueError, TypeError or KeyError for fields that are not those of a calibration."""
        speeds = [SecondsPerFlop(**fields[name]) for name in ("tree", "dense")]
        numbers = [x for rates in speeds for x in asdict(rates).values()] + [fields["error"]]
        if not all(type(x) in (int, float) and math.isfinite(x) and x >= 0 for x in numbers):
            raise ValueError("speeds that are no numbers from 0 on")
        about = fields["about"]
        if (
            type(fields["dense_path"]) is not str
            or type(about) is not dict
            or any(isinstance(value, (dict, list)) for value in about.values())
        ):
            raise ValueError("dense_path is no text, or about is no flat object")
        return cls(**fields | {"tree": speeds[0], "dense": speeds[1]})


def check_writable(path: Path) -> None:
    """Raises InvalidInputError where a file cannot be written at `path`; leaves none, and what is there as it is."""
    try:
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder")
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InvalidInputError(
            f"--output {path} cannot be written: {error}. Expected a file in a folder that is."
        ) from error


def _write(path: Path, text: str) -> None:
    """All of it or nothing: other processes may be reading."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


# Looked up at a model's first call: by model, the option it was looked up with, and what was found.
_known: WeakKeyDictionary[nn.Module, tuple[str, Calibration | None]] = WeakKeyDictionary()


def calibration_of(model: nn.Module, config: TreeConfig) -> Calibration | None:
    """What was measured for this model, as `config.calibration` says; ranks that train together use that of the first.

    Raises InvalidInputError where the option names a file that cannot be read.
    """
    option, found = _known.get(model, ("", None))
    if option != config.calibration:
        found = _look_up(config.calibration, causal_lm(model))
        if is_collective(model):
            found = gathered(model, found)[0]
        _known[model] = (config.calibration, found)
    return found


def tree_cost(model: nn.Module, config: TreeConfig) -> ModelCost:
    """What to weigh trees by: measured seconds, or FLOPs."""
    cost = model_cost(causal_lm(model))
    found = calibration_of(model, config)
    return cost.in_seconds(found.tree) if found is not None else replace(cost, per_call=_CALL_TOKENS * cost.per_token)


def find(model: PreTrainedModel) -> Calibration | None:
    """The calibration in the cache for this model on this machine, if any."""
    try:
        path = _cache_file(describe(model))
        return Calibration.load(path) if path.exists() else None
    except OSError:  # no cache folder, and none can be made
        return None
    except InvalidInputError:  # half written, or of another version
        logger.warning("dta: %s is no calibration of this version and is ignored: run `dta calibrate` again", path)
        return None


def describe(model: PreTrainedModel) -> dict[str, Any]:
    """What decides how fast `model` trains here, under the autocast that is on."""
    config, device = model.config.get_text_config(), input_device(model)
    is_cuda = device.type == "cuda"
    return {
        "model": next(c.__name__ for c in type(model).__mro__ if not issubclass(c, FSDPModule)),  # renames its models
        **{size: one_size(config, size) for size in _SIZES},
        "dtype": str(model.dtype).removeprefix("torch."),
        "autocast": _autocast(device.type),
        "checkpointing": is_checkpointed(model),
        "trained": "all" if all(p.requires_grad for p in model.parameters()) else "adapters",
        "device": torch.cuda.get_device_name(device) if is_cuda else _processor(),
        "threads": None if is_cuda else torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _autocast(device_type: str) -> str | None:
    if not torch.is_autocast_enabled(device_type):
        return None
    return str(torch.get_autocast_dtype(device_type)).removeprefix("torch.")


def _look_up(option: str, model: PreTrainedModel) -> Calibration | None:
    if option == "off":
        return None
    if option == "auto":
        return find(model)
    found = Calibration.load(Path(option).expanduser())
    here = describe(model)
    differing = [
        f"{name} {found.about.get(name)}, here {value}"
        for name, value in here.items()
        if found.about.get(name) != value
    ]
    if differing:
        logger.warning(
            "dta: %s is not used, FLOPs decide: it was measured with %s; run `dta calibrate` for this",
            option,
            "; ".join(differing),
        )
        return None
    return found


def _cache_file(about: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    return cached_assets_path("dta_plugin", subfolder="calibration") / f"{about['model']}-{digest}.json"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())
