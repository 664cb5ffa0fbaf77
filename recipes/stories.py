"""Arithmetic stories and the calculator that solves them: the task of the tool recipes, for TRL and for verl.

A story takes three or four dependent steps, so that a model calls the calculator over several turns, each call with
what the one before returned. Plain Python.
"""

from __future__ import annotations

import ast
import operator
import random
import re
from collections.abc import Callable
from typing import Any

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


def final_number(text: str) -> float:
    """The number after "####" at the very end of a text; where there is none NaN, which equals nothing."""
    found = re.search(r"####\s*(-?\d[\d,]*(?:\.\d+)?)\s*$", text)
    return float(found[1].replace(",", "") if found else "nan")


def compute_score(solution_str: str, ground_truth: str, **_: Any) -> float:
    """For verl (`reward.custom_reward_function.path`): 1 if a rollout, all turns of it, ends with the right number."""
    return float(final_number(solution_str) == float(ground_truth))
