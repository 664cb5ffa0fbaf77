"""Tiny models with recurrent layers for verl, and the rule by which verl's own path keeps packed rows apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel, Qwen3_5MoeForConditionalGeneration, Qwen3NextForCausalLM
from transformers.models.qwen3_5 import modeling_qwen3_5
from transformers.models.qwen3_5.modeling_qwen3_5 import (
    Qwen3_5DecoderLayer,
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5GatedDeltaNet,
)

from dta_plugin.config import TreeConfig
from tests.adapters.verl.support import VOCABULARY, Step
from tests.support.tiny_families import config_of

KINDS: dict[str, type[PreTrainedModel]] = {
    "qwen3_5_text": Qwen3_5ForCausalLM,
    "qwen3_5": Qwen3_5ForConditionalGeneration,
    "qwen3_5_moe": Qwen3_5MoeForConditionalGeneration,
    "qwen3_next": Qwen3NextForCausalLM,
}
# Steps with packed rows, with padded ones, and in chunks; with the positions of text alone and of multimodal models.
PACKED_ROWS = [Step(position_rows=4), Step(shape="turns"), Step(dynamic=False, position_rows=4)]
PADDED_ROWS = [
    Step(shape="turns", dynamic=False, rows=3, remove_padding=False, position_rows=4),
    Step(remove_padding=False, temperature=None),
]
STREAMED = Step(shape="turns", config=TreeConfig(executor="streamed", max_tree_tokens_per_chunk=20))
# What verl replaces, for good, when it builds the multimodal class.
OWN_FORWARDS = {kind: kind.forward for kind in (Qwen3_5DecoderLayer, Qwen3_5GatedDeltaNet)}
_SPECIAL = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
_own_rule = modeling_qwen3_5.torch_chunk_gated_delta_rule


def save_recurrent(folder: Path, family: str = "qwen3_5") -> Path:
    """A model of `KINDS`, every parameter random, and an adapter for all its projections in `adapter`."""
    config = config_of(family)
    for part in (config, config.get_text_config()):
        part.vocab_size, part.tie_word_embeddings = VOCABULARY, False
        part.pad_token_id, part.bos_token_id, part.eos_token_id = 0, 1, 2
    for name in _SPECIAL:
        setattr(config, name, VOCABULARY - 1)
    config.architectures = [KINDS[family].__name__]
    torch.manual_seed(0)
    model = KINDS[family](config)
    shake(model, 0.05)
    shake(model, 0.3, "linear_attn.out_proj")  # recurrent layers have a say
    model.save_pretrained(folder)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    shake(adapted, 0.1, "lora_B")
    adapted.save_pretrained(folder / "adapter")
    return folder


@torch.no_grad()
def shake(model: torch.nn.Module, std: float, part: str = "") -> None:
    for name, parameter in model.named_parameters():
        if part in name:
            parameter += std * torch.randn_like(parameter)


def rule_that_takes_no_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
) -> Any:
    """transformers' own rule. It takes `cu_seqlens` and ignores them; told that there are none, verl cuts the rows."""
    return _own_rule(
        query,
        key,
        value,
        g=g,
        beta=beta,
        initial_state=initial_state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
    )
