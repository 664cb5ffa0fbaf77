"""Run by test_recipes.py: what Megatron makes of each recipe's model and of how GPUs share it, on rank 0 of them.

python -m tests.adapters.megatron.geometry_script <folder>

Ranks are a process group that only has a size, and weights have only shapes. Saves <folder>/found.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "stand_in"))

from dta_plugin.adapters import verl_cpu  # first: verl's modules ask for the platform as they are imported

# isort: split
from mbridge.core import llm_bridge
from megatron.core import parallel_state
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import Qwen3Config, Qwen3MoeConfig
from verl.models.mcore.config_converter import get_hf_rope_theta
from verl.trainer.config import CheckpointConfig
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import HFModelConfig
from verl.workers.engine.megatron.transformer_impl import MegatronEngineWithLMHead

from dta_plugin.adapters.verl_plugin.megatron.obstacles import engine_obstacle
from tests.adapters.verl.recipes import RECIPES, config_of

assert verl_cpu
_BOTH: dict[str, Any] = {
    "vocab_size": 151936,
    "num_attention_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "tie_word_embeddings": False,
}
# As the models' cards have them.
MODELS = {
    "Qwen/Qwen3-8B": Qwen3Config(
        **_BOTH,
        architectures=["Qwen3ForCausalLM"],
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_key_value_heads=8,
    ),
    "Qwen/Qwen3-30B-A3B": Qwen3MoeConfig(
        **_BOTH,
        architectures=["Qwen3MoeForCausalLM"],
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=48,
        num_key_value_heads=4,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        norm_topk_prob=True,
    ),
}
# What differs here: nothing is allocated or initialised, and fusions that need a GPU are off.
_HERE = {
    "init_model_with_meta_device": True,
    "perform_initialization": False,
    "gradient_accumulation_fusion": False,
    "moe_permute_fusion": False,
}


def found(folder: Path, script: Path, machines: int) -> dict[str, Any]:
    """Obstacles of a recipe, its layers, and bytes on a GPU."""
    folder.mkdir()
    _, config = config_of(script, folder, machines)
    MODELS[config.actor_rollout_ref.model.path].save_pretrained(folder)
    gpus = machines * config.trainer.n_gpus_per_node
    distributed.init_process_group("fake", rank=0, world_size=gpus, store=FakeStore())
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    actor.engine.override_transformer_config.update(_HERE)
    model = HFModelConfig(path=str(folder), load_tokenizer=False)
    model.tokenizer = SimpleNamespace(pad_token_id=0)
    engine: Any = MegatronEngineWithLMHead(model, actor.engine, actor.optim, CheckpointConfig())
    engine._build_tf_config()
    model.hf_config.rope_theta = get_hf_rope_theta(model.hf_config)  # as verl does before it builds a model
    module = engine.bridge._model_provider([])(pre_process=True, post_process=True)
    engine.module = [module]
    sizes = {name: parameter.numel() for name, parameter in module.named_parameters()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    rest = sum(sizes.values()) - experts
    shared = rest / parallel_state.get_data_parallel_world_size()
    if experts:
        shared += experts / parallel_state.get_expert_data_parallel_world_size()
    result = {
        "recipe": script.stem,
        "gpus": gpus,
        "obstacle": engine_obstacle(engine),
        "layers": len(module.decoder.layers),
        "kinds": sorted({type(part).__name__ for part in module.modules()}),
        "weights": 2 * (rest + experts),
        "gradients": 4 * (rest + experts),
        "optimizer": 12 * shared,
        "recomputes": engine.tf_config.recompute_granularity,
    }
    parallel_state.destroy_model_parallel()
    distributed.destroy_process_group()
    return result


def main() -> None:
    folder = Path(sys.argv[1])
    new_group = distributed.new_group
    vars(distributed)["new_group"] = lambda *args, **given: new_group(*args, **given | {"backend": "fake"})
    vars(llm_bridge)["get_gpt_decoder_block_spec"] = llm_bridge.get_gpt_decoder_block_spec.__wrapped__
    scripts = sorted((RECIPES / "verl").glob("*_megatron.sh"))
    results = [found(folder / f"{script.stem}{n}", script, n) for script in scripts for n in (1, 8)]
    (folder / "found.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
