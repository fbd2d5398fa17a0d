"""Sums for a small model: problems with one answer, asked in several ways.

A problem (its operator and operands) belongs to one of three sets by a hash: those that conversations show,
those that reinforcement learning asks, and those held out for measuring. One-digit problems are all shown.

An answer works digit by digit from the right, as on paper, before it says the result: each step is a sum of
one-digit numbers, of which there are few enough for a small model to know (https://arxiv.org/abs/2307.03381,
section 5).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

Use = Literal["chat", "tasks", "validation"]
LARGER = 14_000  # problems with a number of three digits

QUESTIONS = {
    "+": [
        "What is {a} + {b}?", "{a} + {b}", "{a} + {b} =", "{a}+{b}", "What is {a}+{b}?",
        "Calculate {a} + {b}.",
        "How much is {a} + {b}?", "Compute {a} + {b}.", "What is {a} plus {b}?", "Add {a} and {b}.",
        "What is the sum of {a} and {b}?", "How much is {a} plus {b}?",
        "I have {a} apples and get {b} more. How many apples do I have?",
        "There are {a} red and {b} blue balls. How many balls are there?",
    ],
    "-": [
        "What is {a} - {b}?", "{a} - {b}", "{a} - {b} =", "{a}-{b}", "What is {a}-{b}?",
        "Calculate {a} - {b}.",
        "How much is {a} - {b}?", "Compute {a} - {b}.", "What is {a} minus {b}?", "Subtract {b} from {a}.",
        "Take {b} away from {a}.", "How much is {a} minus {b}?",
        "I have {a} apples and give {b} away. How many apples are left?",
        "A list has {a} items and {b} are removed. How many remain?",
    ],
    "*": [
        "What is {a} * {b}?", "{a} * {b}", "{a} * {b} =", "{a}*{b}", "Calculate {a} * {b}.",
        "How much is {a} * {b}?",
        "What is {a} times {b}?", "Multiply {a} by {b}.", "What is the product of {a} and {b}?",
        "How much is {a} times {b}?",
    ],
}  # fmt: skip


@dataclass(frozen=True)
class Problem:
    a: int
    operator: str  # + - *
    b: int

    @property
    def equation(self) -> str:
        return f"{self.a} {self.operator} {self.b}"

    @property
    def answer(self) -> int:
        return {"+": self.a + self.b, "-": self.a - self.b, "*": self.a * self.b}[self.operator]

    @property
    def solution(self) -> str:
        """The steps, if any, and the equation: "7 + 5 = 12, 2 + 4 + 1 = 7: 27 + 45 = 72"."""
        result = f"{self.equation} = {self.answer}"
        if max(self.a, self.b) < 10 or self.operator == "*":
            return result
        steps, carry = [], 0
        for place in range(len(str(max(self.a, self.b)))):
            a, b = (value // 10**place % 10 for value in (self.a, self.b))
            if self.operator == "+":
                steps.append(f"{a} + {b}" + (" + 1" if carry else "") + f" = {a + b + carry}")
                carry = (a + b + carry) // 10
            else:
                a -= carry
                carry = int(a < b)
                a += 10 * carry
                steps.append(f"{a} - {b} = {a - b}")
        return f"{', '.join(steps)}: {result}"

    def use(self, seed: int) -> Use:
        """The set this problem belongs to; a + b and b + a are one problem."""
        if max(self.a, self.b) < 10 or self.operator == "*":
            return "chat"
        a, b = (self.a, self.b) if self.operator == "-" else sorted((self.a, self.b))
        part = (
            int.from_bytes(hashlib.sha256(f"{seed}:{a}{self.operator}{b}".encode()).digest()[:8], "big")
            / 2**64
        )
        return "chat" if part < 0.6 else "tasks" if part < 0.9 else "validation"

    def question(self, random: Random) -> str:
        return random.choice(QUESTIONS[self.operator]).format(a=self.a, b=self.b)


def problems(use: Use, seed: int) -> list[Problem]:
    """Problems of a set, shuffled.

    Every sum and difference (not below 0) of 0 to 99, every product of 0 to 12, and LARGER sums and
    differences drawn of numbers up to 999.
    """
    random = Random(f"{seed}:problems")
    found = []
    for a in range(100):
        for b in range(a + 1):
            first, second = random.sample((a, b), 2)
            found += [Problem(first, "+", second), Problem(a, "-", b)]
            if a <= 12:
                found.append(Problem(first, "*", second))
    pairs = [sorted((random.randrange(100, 1000), random.randrange(1000))) for _ in range(LARGER // 2)]
    for b, a in dict.fromkeys(map(tuple, pairs)):
        first, second = random.sample((a, b), 2)
        found += [Problem(first, "+", second), Problem(a, "-", b)]
    found = [problem for problem in found if problem.use(seed) == use]
    Random(f"{seed}:{use}").shuffle(found)
    return found


def exchanges(use: Use, seed: int) -> Iterator[tuple[str, str]]:
    """(question, answer) of every problem of a set."""
    random = Random(f"{seed}:{use}:questions")
    for problem in problems(use, seed):
        yield problem.question(random), problem.solution


def tasks(use: Use, seed: int, count: int) -> list[dict[str, Any]]:
    """Questions with a checkable answer, for rewards.py: {"messages", "answer", "equation"}."""
    random = Random(f"{seed}:{use}:tasks")
    return [
        {
            "messages": [{"role": "user", "content": problem.question(random)}],
            "answer": str(problem.answer),
            "equation": problem.equation,
        }
        for problem in problems(use, seed)[:count]
    ]


def comparison(random: Random) -> tuple[str, str]:
    a, b = random.sample(range(100), 2)
    form = random.randrange(4)
    if form < 2:
        word = ("larger", "smaller")[form]
        question = random.choice(["Which is {w}, {a} or {b}?", "Which number is {w}: {a} or {b}?"])
        return question.format(w=word, a=a, b=b), f"{max(a, b) if form == 0 else min(a, b)} is {word}."
    word = ("greater", "less")[form - 2]
    holds = a > b if form == 2 else a < b
    relation = "greater" if a > b else "less"
    return f"Is {a} {word} than {b}?", f"{'Yes' if holds else 'No'}, {a} is {relation} than {b}."


def sorting(random: Random) -> tuple[str, str]:
    numbers = random.sample(range(100), 3)
    a, b, c = numbers
    question = random.choice(
        ["Sort {a}, {b} and {c}.", "Sort these numbers: {a}, {b}, {c}", "Put {a}, {b}, {c} in order."]
    )
    return question.format(a=a, b=b, c=c), ", ".join(map(str, sorted(numbers)))
