"""Where verl's own path lets packed rows read each other (`use_remove_padding`), which trees never do.

Recurrent layers have to be told where a row begins. Attention that goes by masks (sdpa, eager, flex) is told by
positions, if a model's file hands them on to transformers' function that makes masks; those of some do not (gpt-oss,
AFMoE). flash-attention goes by positions itself.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from tensordict import TensorDict
from transformers import PreTrainedModel
from verl.utils import tensordict_utils as tu

from dta_plugin.adapters.verl_plugin.protocols import Engine
from dta_plugin.errors import UnsupportedError
from dta_plugin.models.introspection import causal_lm, decoder_of
from dta_plugin.models.layer_calls import definer
from dta_plugin.models.recurrent_layers import mixers

_MAKES_MASKS = "create_causal_mask"


@contextmanager
def packing_faults(engine: Engine, data: TensorDict) -> Iterator[list[str]]:
    """Filled within the context, which runs verl's own step on a micro-batch: why its rows read each other."""
    faults: list[str] = []
    with ExitStack() as watching:
        if len(data) > 1 and tu.get_non_tensor_data(data, "use_remove_padding", True):
            with suppress(UnsupportedError):
                model = causal_lm(engine.module)
                faults += filter(None, [_recurrent_fault(engine, model)])
                watching.enter_context(_watched_masks(model, faults))
        yield faults


def _recurrent_fault(engine: Engine, model: PreTrainedModel) -> str | None:
    """verl tells the layers of Qwen3.5's multimodal class where rows begin, and no others."""
    is_told = getattr(engine, "pass_packed_cu_seqlens", False)  # verl 0.9
    if all(is_told and _keeps_rows_apart(getattr(mixer, "chunk_gated_delta_rule", None)) for mixer in mixers(model)):
        return None
    return (
        f"recurrent layers of {type(model).__name__} run across packed rows: verl does not tell them where one begins, "
        "or no kernel heeds it; set actor_rollout_ref.model.use_remove_padding=False (trees need neither)"
    )


@contextmanager
def _watched_masks(model: PreTrainedModel, faults: list[str]) -> Iterator[None]:
    """Within the context, masks that are made without positions are a fault."""
    file = sys.modules[definer(type(decoder_of(model))).__module__]
    stock = getattr(file, _MAKES_MASKS, None)
    if stock is None or "flash" in str(model.config.get_text_config()._attn_implementation):
        yield
        return

    @functools.wraps(stock)
    def watched(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("attention_mask") is None and kwargs.get("position_ids") is None:
            faults.append(
                f"packed rows of {definer(type(model)).__name__} see each other, since its masks know no positions; "
                "set actor_rollout_ref.model.use_remove_padding=False, or use flash-attention (trees need neither)"
            )
        return stock(*args, **kwargs)

    setattr(file, _MAKES_MASKS, watched)
    try:
        yield
    finally:
        setattr(file, _MAKES_MASKS, stock)


def _keeps_rows_apart(rule: Any) -> bool:
    """Whether a delta rule heeds `cu_seqlens`, or takes none, so that verl calls it row by row."""
    if rule is None:
        return False
    parameters = inspect.signature(rule).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return "cu_seqlens" in parameters or not takes_any
