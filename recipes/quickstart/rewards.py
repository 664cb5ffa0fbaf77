"""The quickstart's verifiable reward: did the completion end on the right hour?

    reward_funcs: [recipes.quickstart.rewards.right_answer]   # in a `trl grpo` recipe

`trl grpo` imports the dotted path with the current directory on `sys.path`, so run it from the
repository root. Promises: plain Python, no model, no state; it returns one float per completion.
"""

from __future__ import annotations

import re
from typing import Any

HOP = r"\d \+\d = \d"
SOLUTION = re.compile(rf"(?:guess|(?:{HOP} ; )*\d \+\d =) (\d)")


def parse_answer(completion: str) -> int | None:
    """The hour a guess names or a chain of hops ends on; None for any other text."""
    solution = SOLUTION.fullmatch(completion.strip())
    return int(solution[1]) if solution else None


def right_answer(completions: list[str], answer: list[int], **_: Any) -> list[float]:
    """1 for a well-formed completion that ends on the exact answer, 0 for anything else."""
    return [float(parse_answer(text) == truth) for text, truth in zip(completions, answer, strict=True)]


def compute_score(solution_str: str, ground_truth: str, **_: Any) -> float:
    """The same for verl, one completion at a time: `reward.custom_reward_function.path` is this file."""
    return float(parse_answer(solution_str) == int(ground_truth))
