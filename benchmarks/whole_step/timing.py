"""Where the time of a trainer's steps goes: sampling, scoring (old and reference log-probs, rewards), the update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback
from trl import GRPOTrainer


@dataclass(slots=True)
class Parts:
    """Seconds of all steps of a training. update: forward, backward and optimizer."""

    sampling: float = 0.0
    scoring: float = 0.0
    update: float = 0.0

    @property
    def step(self) -> float:
        return self.sampling + self.scoring + self.update


class Stopwatch(TrainerCallback):
    """Times the steps of `trainer` by `clock` (seconds); `take` hands out what has passed since its last call."""

    def __init__(self, trainer: GRPOTrainer, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._sampling = self._preparing = self._steps = self._begun = 0.0
        trainer._generate = self._timed("_sampling", trainer._generate)
        trainer._generate_and_score_completions = self._timed("_preparing", trainer._generate_and_score_completions)
        trainer.add_callback(self)

    def take(self) -> Parts:
        parts = Parts(self._sampling, self._preparing - self._sampling, self._steps - self._preparing)
        self._sampling = self._preparing = self._steps = 0.0
        return parts

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._begun = self._clock()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._steps += self._clock() - self._begun

    def _timed(self, part: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self._clock()
            try:
                return method(*args, **kwargs)
            finally:
                setattr(self, part, getattr(self, part) + self._clock() - start)

        return timed
