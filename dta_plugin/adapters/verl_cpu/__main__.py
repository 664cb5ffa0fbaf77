"""The command line of verl's trainer, for machines without an accelerator:

    python -m dta_plugin.adapters.verl_cpu trainer.n_gpus_per_node=2 ...       # instead of verl.trainer.main_ppo

Promises: every process of the run imports dta_plugin.adapters.verl_cpu; a rank is one of `n_gpus_per_node` logical GPUs
of Ray. The settings in `DEFAULTS`, and those for the `model_engine` (`dp`, which is FSDP, or `megatron`), come before
yours, so yours win. Nothing else differs from verl's own command.
"""

from __future__ import annotations

import os
import sys

from dta_plugin.adapters.verl_cpu.install import HAS_PLATFORMS
from dta_plugin.adapters.verl_cpu.megatron import TRANSFORMER_CONFIG

MODULE = "dta_plugin.adapters.verl_cpu"
RANKS = "trainer.n_gpus_per_node"
DEFAULTS = [
    f"{RANKS}=2",
    f"trainer.device={'cpu' if HAS_PLATFORMS else 'cuda'}",  # what stands for Ray's GPUs
    "actor_rollout_ref.rollout.name=hf_cpu",
    "actor_rollout_ref.rollout.tensor_model_parallel_size=1",
    "actor_rollout_ref.rollout.dtype=float32",
    "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
    "ray_kwargs.ray_init.num_cpus=32",  # logical: what verl's actors ask for, not what they use
]
MEGATRON = "actor_rollout_ref.actor.megatron"
# Besides, by the `model_engine`.
DEFAULTS_OF_ENGINES = {
    "dp": [
        "actor_rollout_ref.actor.strategy=fsdp2",
        "actor_rollout_ref.ref.strategy=fsdp2",
        "actor_rollout_ref.actor.fsdp_config.use_torch_compile=False",  # for an entropy over the vocabulary
        "actor_rollout_ref.ref.fsdp_config.use_torch_compile=False",
    ],
    "megatron": [
        f"{MEGATRON}.vanilla_mbridge=True",
        *(f"+{MEGATRON}.override_transformer_config.{name}={value}" for name, value in TRANSFORMER_CONFIG.items()),
    ],
}


def with_defaults(overrides: list[str]) -> list[str]:
    """Hydra overrides for a CPU, then the given ones; as many logical GPUs as ranks."""
    given = dict(text.split("=", 1) for text in [*DEFAULTS, *overrides] if "=" in text)
    of_engine = DEFAULTS_OF_ENGINES.get(given.get("model_engine", "dp"), [])
    return [f"+ray_kwargs.ray_init.num_gpus={given[RANKS]}", *DEFAULTS, *of_engine, *overrides]


def main() -> None:
    others = filter(None, os.environ.get("VERL_USE_EXTERNAL_MODULES", "").split(","))
    os.environ["VERL_USE_EXTERNAL_MODULES"] = ",".join(dict.fromkeys([MODULE, *others]))
    sys.argv[1:] = with_defaults(sys.argv[1:])

    from verl.trainer.main_ppo import main as train

    train()


if __name__ == "__main__":
    main()
