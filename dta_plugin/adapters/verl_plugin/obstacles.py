"""Where verl asks for something that a tree cannot give exactly: a reason that names the setting and the remedy.

`batch_obstacle` looks at one rank's mini-batch, `images` at what pictures and positions it has; the engine lets all
ranks agree. What the model itself rules out (recurrent layers that are not known, dropout, prompt tuning) is
`models.support`'s to say.
"""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu

from dta_plugin.adapters.verl_plugin.images import position_obstacle, row_images
from dta_plugin.adapters.verl_plugin.protocols import Engine

_NEEDS_LOGITS = {
    "calculate_sum_pi_squared": (
        "calculate_sum_pi_squared needs all logits; set actor_rollout_ref.actor.calculate_sum_pi_squared=False"
    ),
    "distillation_use_topk": "top-k distillation needs all logits; use a distillation loss without top-k",
    "distillation_only": "distillation without a policy loss needs all logits; use the policy's log-probs too",
}


def engine_obstacle(engine: Engine) -> str | None:
    """What in an engine's own configuration a tree cannot follow, or None."""
    if engine.use_ulysses_sp:
        size = engine.ulysses_sequence_parallel_size
        return (
            f"ulysses_sequence_parallel_size={size} cuts rows across ranks; set "
            "actor_rollout_ref.actor.ulysses_sequence_parallel_size=1 (a tree needs far fewer tokens per rank)"
        )
    if engine._qat_enabled:
        return "quantisation-aware training scales by what is in a batch; set actor_rollout_ref.actor.qat.enable=False"
    if getattr(engine.model_config.mtp, "enable_train", False):
        return "multi-token prediction trains further heads; set actor_rollout_ref.model.mtp.enable_train=False"
    if engine.model_config.enable_activation_offload:
        return (
            "activation offloading expects one forward pass per micro-batch through verl's own path; set "
            "actor_rollout_ref.model.enable_activation_offload=False, gradient checkpointing works"
        )
    return None


def batch_obstacle(data: TensorDict) -> str | None:
    """What in a mini-batch a tree cannot follow, or None; of its rows' images and positions, see `images`."""
    for key, reason in _NEEDS_LOGITS.items():
        if tu.get_non_tensor_data(data, key, False):
            return reason
    if "routed_experts" in data.keys():  # noqa: SIM118 (a TensorDict)
        return "the batch has routed_experts (router replay), which are per row; switch the replay off"
    if _counts_first_tokens(data):
        return (
            "loss_mask counts the first token of a row, so that verl's sft_loss reads what the end of the row before "
            "it in the micro-batch predicts of it; set loss_mask to 0 there, as verl's own dataset does"
        )
    return None


def _counts_first_tokens(data: TensorDict) -> bool:
    """Of SFT batches, whose mask is over all tokens; that of a PPO batch is over responses."""
    mask: Any = data.get("loss_mask", None)
    if mask is None or not mask.is_nested or not torch.equal(mask.offsets(), data["input_ids"].offsets()):
        return False
    return bool(mask.values()[mask.offsets()[:-1]].any())


def text_obstacle(data: TensorDict) -> str | None:
    """The same, of critics, diffusion LMs and Megatron's engine, which take text alone."""
    if row_images(data) is not None:
        return (
            "the batch has images or other multimodal inputs, which only causal actors with strategy=fsdp(2) take "
            "along; train on text"
        )
    return batch_obstacle(data) or position_obstacle(data, None)
