"""The tool of multi_turn_agent.sh; its task and its reward are in recipes/stories.py.

    actor_rollout_ref.rollout.multi_turn.function_tool_path=recipes/verl/tools.py

A file of its own: verl takes for a file's tools those that appear when it is imported, so nothing else may import it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from verl.tools.function_tool import function_tool

sys.path.insert(0, str(Path(__file__).parents[2]))
from recipes.stories import calculate

function_tool("calculate")(calculate)
