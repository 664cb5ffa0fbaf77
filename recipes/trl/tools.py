"""GRPO with a tool: arithmetic stories that the model solves by calling a calculator, over several turns.

    python -m dta_plugin.run recipes/trl/tools.py --config recipes/trl/qwen3_4b_tools.yaml

An ordinary TRL script: it does not know the plugin (see gsm8k.py). TRL runs the loop: it parses a turn's tool calls,
calls `calculate`, appends the results and lets the model go on, until a turn has no call. Nothing is downloaded but
the model: the stories are made up here.

Rollouts of one prompt part at their first different call and go on from there, so their tree forks turn by turn;
tool results are part of it, and carry no loss.
"""

from __future__ import annotations

import ast
import operator
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer, ModelConfig, TrlParser, get_peft_config

Messages = list[dict[str, Any]]

INSTRUCTION = (
    "You answer questions about amounts. Never calculate in your head: call the calculator, one step per call, and use "
    "what it returns in the next call. When you know the answer, end with a line that holds four number signs and the "
    "number, such as: #### 42"
)
OPERATORS: dict[type[ast.AST], Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
    ast.USub: operator.neg,
}


@dataclass
class ToolArguments:
    """What the script itself takes."""

    stories: int = field(default=4000, metadata={"help": "Number of training prompts."})
    story_seed: int = field(default=0, metadata={"help": "Seed of the stories."})


def calculate(expression: str) -> str:
    """
    Evaluate an arithmetic expression.

    Args:
        expression: Numbers, parentheses and the operators + - * / and % (remainder), as in "(12 + 5) * 3".

    Returns:
        The value of the expression.
    """
    if len(expression) > 200:
        raise ValueError("the expression has more than 200 characters")
    return f"{evaluate(ast.parse(expression.strip(), mode='eval').body):.12g}"


def evaluate(node: ast.expr) -> float:
    """The value of a parsed expression; ValueError for anything but arithmetic."""
    match node:
        case ast.Constant(value=int() | float() as value):
            return value
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](evaluate(left), evaluate(right))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -evaluate(operand)
    raise ValueError("expected nothing but numbers, parentheses and + - * / %")


def story(rng: random.Random) -> dict[str, Any]:
    """A prompt whose solution takes three or four dependent steps, and the solution."""
    what = rng.choice(["bulbs", "tiles", "bolts", "seeds", "labels", "bottles"])
    boxes, each, broken = rng.randint(23, 98), rng.randint(112, 987), rng.randint(211, 1999)
    left = boxes * each - broken
    text = f"A depot gets {boxes} boxes with {each} {what} each. {broken} {what} are broken and thrown away. "
    if rng.random() < 0.5:
        price, rent = rng.randint(3, 19), rng.randint(310, 1700)
        text += (
            f"The rest is sold at {price} dollars apiece, and {rent} dollars of rent are paid. How much is left over?"
        )
        solution = left * price - rent
    else:
        shops = rng.randint(3, 9)
        text += f"{shops} shops share the rest evenly, each taking as many as possible. How many {what} stay behind?"
        solution = left % shops
    messages = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": text}]
    return {"prompt": messages, "solution": solution}


def correct(completions: list[Messages], solution: list[int], **_: Any) -> list[float]:
    """1 if the last turn ends with the right number, else 0."""
    return [float(final_number(turns[-1]) == s) for turns, s in zip(completions, solution, strict=True)]


def used_tool(completions: list[Messages], **_: Any) -> list[float]:
    """0.1 if the calculator was called and no call failed."""
    results = [[turn["content"] for turn in turns if turn["role"] == "tool"] for turns in completions]
    return [0.1 * (bool(found) and not any("error" in text for text in found)) for found in results]


def final_number(turn: dict[str, Any]) -> float:
    """The number after "####" at the very end of a turn; where there is none NaN, which equals nothing."""
    found = re.search(r"####\s*(-?\d[\d,]*(?:\.\d+)?)\s*$", turn.get("content") or "")
    return float(found[1].replace(",", "") if found else "nan")


def main() -> None:
    parser = TrlParser((ToolArguments, GRPOConfig, ModelConfig))
    script_args, training_args, model_args = parser.parse_args_and_config()
    training_args.model_init_kwargs = {"dtype": model_args.dtype, "attn_implementation": model_args.attn_implementation}
    rng = random.Random(script_args.story_seed)
    trainer = GRPOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        reward_funcs=[correct, used_tool],
        train_dataset=Dataset.from_list([story(rng) for _ in range(script_args.stories)]),
        tools=[calculate],
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)


if __name__ == "__main__":
    main()
