"""A process of verl's one-step-off trainer: its class, its start of workers, its next batch; without Ray and rollouts.

Nothing here imports the plugin, but the helpers that make rows; they are imported once the trainer has been started.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import verl.experimental.one_step_off_policy
from hydra import compose, initialize_config_dir
from verl.experimental.one_step_off_policy.ray_trainer import OneStepOffRayTrainer

PLUGIN = "dta_plugin.adapters.verl"


class _Rollouts:
    """A finished generation, whatever is asked for."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    async def generate_sequences(self, _: Any) -> Any:
        return self.batch


def _config(overrides: list[str]) -> Any:
    folder = Path(verl.experimental.one_step_off_policy.__file__).parent / "config"
    with initialize_config_dir(str(folder), version_base=None):
        return compose(
            "one_step_off_ppo_trainer",
            [
                "hydra.searchpath=[pkg://verl.trainer.config]",
                f"actor_rollout_ref.model.external_lib={PLUGIN}",
                "actor_rollout_ref.actor.ppo_mini_batch_size=8",
                "actor_rollout_ref.rollout.n=4",
                *overrides,
            ],
        )


def _start_workers(trainer: Any) -> None:
    """`init_workers` up to the first thing that needs Ray."""

    class _NeedsRay(Exception):
        pass

    def create_resource_pool() -> None:
        print("resource pools")
        raise _NeedsRay

    trainer.resource_pool_manager = SimpleNamespace(create_resource_pool=create_resource_pool)
    with suppress(_NeedsRay):
        trainer.init_workers()
    trainer.actor_rollout_wg = SimpleNamespace(_dispatch_info={"actor": [0, 1]})


def main() -> None:
    trainer = OneStepOffRayTrainer.__new__(OneStepOffRayTrainer)
    trainer.config = _config(sys.argv[1:])
    trainer.global_steps, trainer.use_critic = 1, False
    assert PLUGIN not in sys.modules
    _start_workers(trainer)
    print("plugin imported:", PLUGIN in sys.modules)

    from tests.adapters.verl.batches import data_proto, star_rows

    batch = data_proto(star_rows(16, 4, prompt=60, median=40))
    del batch.non_tensor_batch["uid"]  # which the trainer gives
    batch.batch["response_mask"] = batch.batch["attention_mask"][:, 60:]
    prompts = {"prompt": batch.batch["place"][::4].clone()}
    trainer.async_rollout_manager = _Rollouts(batch)
    trainer._get_gen_batch = lambda prompts: prompts
    finished = asyncio.run(trainer._async_gen_next_batch(iter([(0, prompts)])))
    for name, value in finished[0].items():
        print("metric", name, float(value))


if __name__ == "__main__":
    main()
