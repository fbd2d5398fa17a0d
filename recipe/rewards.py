"""Rewards for `train.py grpo`: functions of (prompt, completion, task), named as `recipe.rewards:either`."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Mapping
from typing import Any

ONE_DIGIT_WRONG = 0.2
NO_PARAMETER = 0.5  # a function that does something, but not with what it is given
SAME_LINE = 2  # how often a line may be repeated; a model that repeats it more has lost its thread


def either(prompt: object, completion: str, task: Mapping[str, Any]) -> float:
    """The reward of a line of tasks.jsonl or of functions.jsonl."""
    return (arithmetic if "answer" in task else function)(prompt, completion, task)


def function(prompt: object, completion: str, task: Mapping[str, Any]) -> float:
    """1 for a reply that is one whole function of the asked name and uses a parameter; 0.5 if it uses none.

    task: a line of functions.jsonl, with "ended". Text that does not parse, other code beside the function, a
    body that is empty or begins with the return of a bare name or constant, and a line repeated over and over
    have none. Whether the function is right cannot be checked.
    """
    lines = [line.strip() for line in completion.splitlines() if line.strip()]
    if not task["ended"] or max(map(lines.count, lines), default=0) > SAME_LINE:
        return 0.0
    try:
        with warnings.catch_warnings():  # no warnings about odd literals
            warnings.simplefilter("ignore")
            tree = ast.parse(completion)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return 0.0
    if len(tree.body) != 1 or not isinstance(tree.body[0], ast.FunctionDef | ast.AsyncFunctionDef):
        return 0.0
    found = tree.body[0]
    body = found.body[ast.get_docstring(found) is not None :]
    if (
        found.name != task["function"]
        or not body
        or all(isinstance(statement, ast.Pass) for statement in body)
    ):
        return 0.0
    if isinstance(body[0], ast.Return) and isinstance(body[0].value, ast.Name | ast.Constant | None):
        return 0.0  # `return self` and the like: whole, and worth nothing
    used = {node.id for statement in body for node in ast.walk(statement) if isinstance(node, ast.Name)}
    return 1.0 if not task["parameters"] or used & set(task["parameters"]) else NO_PARAMETER


def arithmetic(prompt: object, completion: str, task: Mapping[str, Any]) -> float:
    """1 for a reply that ends in the right answer, alone or as `equation = answer`; 0.2 if a digit is wrong.

    task: a line of tasks.jsonl, with "ended". What stands before the last colon, the working, is the model's
    own affair. The partial reward is for groups in which nobody is right: a slipped carry is better than
    nonsense, so there is something to learn. It is small, so that being right now and then pays more than
    being nearly right always.
    """
    if not task["ended"]:
        return 0.0
    said = completion.rpartition(": ")[2].strip().removesuffix(".").removeprefix(f"{task['equation']} = ")
    answer = task["answer"]
    if said == answer:
        return 1.0
    if not (said.isascii() and said.isdecimal()) or len(said) != len(answer) or len(answer) < 2:
        return 0.0
    wrong = sum(a != b for a, b in zip(said, answer, strict=True))
    return ONE_DIGIT_WRONG if wrong == 1 else 0.0
