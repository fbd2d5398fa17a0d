"""Rewards for `train.py grpo`: functions of (prompt, completion, task), named as `recipe.rewards:arithmetic`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ONE_DIGIT_WRONG = 0.2


def arithmetic(prompt: object, completion: str, task: Mapping[str, Any]) -> float:
    """1 for a turn that ends after the right answer, alone or as `equation = answer`; 0.2 if one digit is wrong.

    task: a line of tasks.jsonl, with "ended", whether the completion ended its turn. The partial reward is for
    groups in which nobody is right: a slipped carry is better than nonsense, so there is something to learn. It
    is small, so that being right now and then pays more than being nearly right always.
    """
    if not task["ended"]:
        return 0.0
    said = completion.strip().removesuffix(".").removeprefix(f"{task['equation']} = ")
    answer = task["answer"]
    if said == answer:
        return 1.0
    if not (said.isascii() and said.isdecimal()) or len(said) != len(answer) or len(answer) < 2:
        return 0.0
    wrong = sum(a != b for a, b in zip(said, answer, strict=True))
    return ONE_DIGIT_WRONG if wrong == 1 else 0.0
