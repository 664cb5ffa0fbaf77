"""Losses are back-propagated one by one, all but the last, whose value is that of the sum."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from dta_plugin.training.diffusion.update import back_propagated

CPU = torch.device("cpu")


class Log:
    """Writes down when a loss is asked for, when it is back-propagated, and what the context encloses."""

    def __init__(self) -> None:
        self.text = ""
        self.weight = torch.ones((), requires_grad=True)

    def losses(self, count: int) -> Iterator[torch.Tensor]:
        for number in range(count):
            self.text += "?"
            yield (number + 1) * self.weight

    def backward(self, loss: torch.Tensor) -> None:
        self.text += "."
        loss.backward()

    @contextmanager
    def later(self) -> Iterator[None]:
        self.text += "("
        yield
        self.text += ")"


def test_all_but_the_last() -> None:
    log = Log()
    last = back_propagated(log.losses(3), 3, log.backward, log.later(), CPU)
    assert log.text == "(?.?.)?" and last.item() == 6 and log.weight.grad == 3
    last.backward()
    assert log.weight.grad == 6


def test_one_loss() -> None:
    log = Log()
    back_propagated(log.losses(1), 1, log.backward, log.later(), CPU).backward()
    assert log.text == "()?" and log.weight.grad == 1


def test_nothing_to_learn_from() -> None:
    log = Log()
    last = back_propagated(log.losses(0), 3, log.backward, log.later(), CPU)
    last.backward()
    assert last.item() == 0 and log.weight.grad is None


def test_evaluation() -> None:
    log = Log()
    with torch.no_grad():
        assert back_propagated(log.losses(3), 3, log.backward, nullcontext(), CPU).item() == 6
    assert "." not in log.text
