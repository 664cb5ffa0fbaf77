"""Run by test_transformer_engine.py: as ranks_script, with the layers that Megatron makes for Transformer Engine.

python -m tests.adapters.megatron.te_script <folder> <name in LAYOUTS or SPECIAL> ...

Those classes are Megatron's own; what they extend is in stand_in/transformer_engine.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "stand_in"))

from dta_plugin.adapters import verl_cpu  # first: verl's modules ask for the platform as they are imported

# isort: split
import pytest
from mbridge.core import llm_bridge
from mbridge.core.bridge import Bridge
from verl.utils.megatron_utils import unwrap_model

from dta_plugin.config import TreeConfig
from tests.adapters.megatron import ranks_script
from tests.adapters.megatron.faults import FAULTS
from tests.adapters.megatron.support import RECOMPUTATION, Setup, build, differences
from tests.adapters.verl.support import Step

assert verl_cpu
TENSOR = ranks_script.TENSOR
FUSED = {"apply_rope_fusion": True}
GROUPED = {"moe_grouped_gemm": True, "moe_permute_fusion": False}
EXPERTS = {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}
BRIDGE = {"vanilla_mbridge": False}
LORA = {
    "type": "lora",
    "rank": 4,
    "alpha": 8,
    "dropout": 0.0,
    "target_modules": ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"],
    "lora_A_init_method": "xavier",
    "lora_B_init_method": "xavier",
}
LAYOUTS = {
    "packed": Setup(),
    "biases": Setup("qwen2"),
    "padded": Setup(packed=False),
    "fused rotary": Setup(transformer=FUSED),
    "fused rotary, padded": Setup(packed=False, transformer=FUSED),
    "grouped experts": Setup("moe", transformer=GROUPED),
    "full recomputation": Setup(transformer=RECOMPUTATION["full"]),
    "selective recomputation": Setup(transformer=RECOMPUTATION["selective"]),
    "sliding window": Setup(packed=False, transformer={"window_size": (6, 0), "window_attn_skip_freq": 2}),
    "tensor": Setup(engine=TENSOR | {"sequence_parallel": False}, transformer={"sequence_parallel": False} | FUSED),
    "sequence": Setup(engine=TENSOR, transformer=FUSED),
    "grouped experts, sequence": Setup("moe", engine=TENSOR, transformer=GROUPED),
    "experts on ranks": Setup("moe", engine=EXPERTS, transformer=GROUPED),
    "experts on ranks, sequence": Setup("moe", engine=TENSOR | EXPERTS, transformer=GROUPED),
    "bridge": Setup(engine=BRIDGE),
    "bridge, tied": Setup("tied", engine=BRIDGE),
    "bridge, padded": Setup(packed=False, engine=BRIDGE),
    "bridge, experts": Setup("moe", engine=BRIDGE, transformer=GROUPED),
    "bridge, lora": Setup(engine=BRIDGE, lora=LORA),
    "bridge, lora, recomputed": Setup(engine=BRIDGE, lora=LORA, transformer=RECOMPUTATION["full"]),
    "bridge, lora, experts": Setup("moe", engine=BRIDGE, lora=LORA, transformer=GROUPED),
    "bridge, lora, sequence": Setup(engine=BRIDGE | TENSOR, lora=LORA),
}


def layers(folder: Path) -> dict[str, Any]:
    """Which classes a model is made of."""
    found = {}
    for model, transformer in (("qwen3", {}), ("moe", GROUPED)):
        engine = build(Setup(model, transformer=transformer), folder, tree=True)
        layer = unwrap_model(engine.module[0]).decoder.layers[0]
        attention, mlp = layer.self_attention, layer.mlp
        parts = [attention.core_attention, attention.linear_qkv, attention.linear_proj, attention.q_layernorm]
        parts.append(mlp.experts if model == "moe" else mlp.linear_fc1)
        found[model] = [type(part).__name__ for part in parts]
    return found


def wrong_positions(setup: Setup, folder: Path) -> dict[str, Any]:
    """A rotary table that goes by index."""
    with pytest.MonkeyPatch.context() as patch:
        FAULTS["rotary by index"](patch)
        step = Step(shape="turns", config=TreeConfig(probe="off"))
        return {"differences": differences(setup, [step], folder)[0]}


if __name__ == "__main__":
    # Where verl_cpu asks for Megatron's own layers, and maps their names.
    vars(llm_bridge)["get_gpt_decoder_block_spec"] = llm_bridge.get_gpt_decoder_block_spec.__wrapped__
    for name, wrapped in list(vars(Bridge).items()):
        if (own := getattr(wrapped, "__wrapped__", None)) is not None:
            setattr(Bridge, name, own)
    ranks_script.LAYOUTS.clear()
    ranks_script.LAYOUTS.update(LAYOUTS)
    ranks_script.SPECIAL["layers"] = layers
    ranks_script.SPECIAL["wrong positions"] = functools.partial(wrong_positions, Setup(transformer=FUSED))
    ranks_script.SPECIAL["bridge, wrong positions"] = functools.partial(
        wrong_positions, Setup(engine=BRIDGE, lora=LORA)
    )
    ranks_script.main()
