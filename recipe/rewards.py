"""Rewards for reinforcement learning: functions of (prompt, completion, task), as `recipe.rewards:arithmetic`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

END_OF_TURN = "<|im_end|>"
ONE_DIGIT_WRONG = 0.2


def arithmetic(prompt: object, completion: str, task: Mapping[str, Any]) -> float:
    """1 for the right answer and nothing else, alone or as `equation = answer`; 0.2 if one digit of it is wrong.

    The whole completion is compared, so a turn that does not end is worth nothing. The partial reward is for
    groups in which nobody is right: a slipped carry is then better than nonsense, and there is something to learn.
    It is small, so that guessing one digit never pays as much as now and then being right.
    """
    said = completion.removesuffix(END_OF_TURN).strip().removesuffix(".")
    said = said.removeprefix(f"{task['equation']} = ")
    answer = task["answer"]
    if said == answer:
        return 1.0
    if not (said.isascii() and said.isdecimal()) or len(said) != len(answer) or len(answer) < 2:
        return 0.0
    wrong = sum(a != b for a, b in zip(said, answer, strict=True))
    return ONE_DIGIT_WRONG if wrong == 1 else 0.0
