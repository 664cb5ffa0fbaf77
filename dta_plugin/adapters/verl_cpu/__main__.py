"""The command line of verl's trainer, for machines without an accelerator:

    python -m dta_plugin.adapters.verl_cpu trainer.n_gpus_per_node=2 ...       # instead of verl.trainer.main_ppo

Promises: every process of the run imports dta_plugin.adapters.verl_cpu; a rank is one of `n_gpus_per_node` logical GPUs
of Ray. The settings in `DEFAULTS` come before yours, so yours win. Nothing else differs from verl's own command.
"""

from __future__ import annotations

import os
import sys

MODULE = "dta_plugin.adapters.verl_cpu"
RANKS = "trainer.n_gpus_per_node"
DEFAULTS = [
    f"{RANKS}=2",
    "trainer.device=cpu",
    "actor_rollout_ref.rollout.name=hf_cpu",
    "actor_rollout_ref.rollout.tensor_model_parallel_size=1",
    "actor_rollout_ref.rollout.dtype=float32",
    "actor_rollout_ref.actor.strategy=fsdp2",
    "actor_rollout_ref.actor.fsdp_config.use_torch_compile=False",  # for an entropy over the vocabulary
    "actor_rollout_ref.ref.fsdp_config.use_torch_compile=False",
    "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
    f"trainer.v1.sampler.custom_sampler.path=pkg://{MODULE}.replay",
    "trainer.v1.sampler.custom_sampler.name=EagerReplayBuffer",
    "ray_kwargs.ray_init.num_cpus=32",  # logical: what verl's actors ask for, not what they use
]


def main() -> None:
    os.environ["VERL_USE_EXTERNAL_MODULES"] = ",".join(
        dict.fromkeys([MODULE, *filter(None, os.environ.get("VERL_USE_EXTERNAL_MODULES", "").split(","))])
    )
    overrides = [*DEFAULTS, *sys.argv[1:]]
    ranks = [value for name, _, value in (text.partition("=") for text in overrides) if name == RANKS][-1]
    sys.argv[1:] = [f"+ray_kwargs.ray_init.num_gpus={ranks}", *overrides]

    from verl.trainer.main_ppo import main as train

    train()


if __name__ == "__main__":
    main()
