"""verl's replay buffer, looking for finished rollouts more often: every two seconds would be most of a small step.

    trainer.v1.sampler.custom_sampler.path=pkg://dta_plugin.adapters.verl_cpu.replay
    trainer.v1.sampler.custom_sampler.name=EagerReplayBuffer

Promises: the same batches in the same order. Known limit: verl leaves `algorithm.filter_groups` to custom samplers, and
this one does not filter.
"""

from __future__ import annotations

from typing import Any

from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

POLL_SECONDS = 0.1


class EagerReplayBuffer(ReplayBuffer):
    """For the synchronous trainer."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, poll_interval=POLL_SECONDS)
