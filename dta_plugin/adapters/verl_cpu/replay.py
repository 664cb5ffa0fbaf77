"""verl's replay buffer, looking for finished rollouts ten times a second: verl's two seconds are most of a small step."""

from __future__ import annotations

from typing import Any

from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

POLL_SECONDS = 0.1


class EagerReplayBuffer(ReplayBuffer):
    """For `trainer.v1.sampler.custom_sampler`; the same batches in the same order."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, poll_interval=POLL_SECONDS)
