"""The tool and the reward of multi_turn_agent.sh; its task is in recipes/stories.py.

actor_rollout_ref.rollout.multi_turn.function_tool_path=recipes/verl/tools.py
reward.custom_reward_function.path=recipes/verl/tools.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from verl.tools.function_tool import function_tool

sys.path.insert(0, str(Path(__file__).parents[2]))
from recipes import stories

function_tool("calculate")(stories.calculate)


def compute_score(solution_str: str, ground_truth: str, **_: Any) -> float:
    """1 if the rollout, all turns of it, ends with the right number, else 0."""
    return float(stories.final_number(solution_str) == float(ground_truth))
