"""A process of verl's one-step-off trainer: its class, start of workers and next batch; without Ray and rollouts.

python -m tests.adapters.verl.separate_trainers_script <one_step_off|fully_async> <hydra overrides>

Of a fully-async trainer, the class that Ray makes an actor of, and its way to balance what it got from the queue.
Nothing here imports the plugin, but the helpers that make rows; they are imported once the trainer has been started.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import verl.experimental
from hydra import compose, initialize_config_dir
from ray import cloudpickle

PLUGIN = "dta_plugin.adapters.verl"


class _Rollouts:
    """A finished generation, whatever is asked for."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    async def generate_sequences(self, _: Any) -> Any:
        return self.batch


def _trainer(kind: str) -> Any:
    if kind == "one_step_off":
        from verl.experimental.one_step_off_policy.ray_trainer import OneStepOffRayTrainer

        return OneStepOffRayTrainer.__new__(OneStepOffRayTrainer)
    from verl.experimental.fully_async_policy.fully_async_trainer import FullyAsyncTrainer

    actor = cloudpickle.loads(cloudpickle.dumps(FullyAsyncTrainer.__ray_metadata__.modified_class))
    return actor.__new__(actor)


def _config(kind: str, overrides: list[str]) -> Any:
    folder = Path(verl.experimental.__file__).parent / f"{kind}_policy" / "config"
    with initialize_config_dir(str(folder), version_base=None):
        return compose(
            f"{kind}_ppo_trainer",
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
        started = trainer.init_workers()
        if started is not None:
            asyncio.run(started)
    trainer.actor_rollout_wg = SimpleNamespace(_dispatch_info={"actor": [0, 1]})


def main() -> None:
    kind, *overrides = sys.argv[1:]
    trainer = _trainer(kind)
    trainer.config = _config(kind, overrides)
    trainer.global_steps, trainer.use_critic = 1, False
    assert PLUGIN not in sys.modules
    _start_workers(trainer)
    print("plugin imported:", PLUGIN in sys.modules)

    from tests.adapters.verl.batches import data_proto, star_rows

    batch = data_proto(star_rows(16, 4, prompt=60, median=40))
    metrics: dict[str, float] = {}
    if kind == "fully_async":
        trainer._balance_batch(batch, metrics=metrics)  # as `assemble_batch_from_rollout_samples` does
    else:
        del batch.non_tensor_batch["uid"]  # which the trainer gives
        batch.batch["response_mask"] = batch.batch["attention_mask"][:, 60:]
        prompts = {"prompt": batch.batch["place"][::4].clone()}
        trainer.async_rollout_manager = _Rollouts(batch)
        trainer._get_gen_batch = lambda prompts: prompts
        metrics = asyncio.run(trainer._async_gen_next_batch(iter([(0, prompts)])))[0]
    for name, value in metrics.items():
        print("metric", name, float(value))


if __name__ == "__main__":
    main()
