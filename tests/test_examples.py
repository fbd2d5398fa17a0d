"""Every script in examples/ runs, and says what is true.

python -m pytest tests/test_examples.py
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from small_models import TINY_QWEN3, export_small_model

from qwen3c import Model
from qwen3c.drivers.retrieval import instruct
from qwen3c.inspect.perplexity import measure

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments: str) -> str:
    """What examples/NAME.py prints; on the model in the box unless the arguments name another."""
    root = str(EXAMPLES.parent)
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=60,
        env=os.environ | {"PYTHONPATH": root, "PYTHONUTF8": "1"},
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(str(TINY_QWEN3))


def test_ask_says_what_the_calls_say(model: Model) -> None:
    answer = model.chat("Who?", 100, seed=1)
    text = "import os" + model.complete("import os", 24, temperature=0).text
    line = rf"\[{answer.finish_reason}: {answer.stats.generated_tokens} tokens, \d+ a second\]"
    expected = rf"{re.escape(answer.text)}\n{line}\n{re.escape(text)}\n"
    assert re.fullmatch(expected, run("ask", str(TINY_QWEN3), "Who?"))


def test_chat_remembers_both_questions() -> None:
    out = run("chat", str(TINY_QWEN3), "Who?", "And when?")
    assert "> Who?" in out and "> And when?" in out
    told = re.search(r"(\d+) messages, (\d+) tokens in the session", out)
    assert told
    messages, tokens = map(int, told.groups())
    assert messages == 4 and tokens > 60


def test_stream_shows_a_reply_and_why_it_ended() -> None:
    assert re.search(
        r"^, name, value\):\n.*\n\[(stop|length|cancelled): \d+ tokens, \d+ a second\]\n$",
        run("stream", str(TINY_QWEN3)),
        re.DOTALL,
    )


def test_logprobs_agree_with_the_perplexity(model: Model) -> None:
    text = "import os\nimport sys\n"
    out = run("logprobs", str(TINY_QWEN3), text)
    expected = measure(model, model.tokenizer.encode(text), 256).perplexity
    told = re.search(r"perplexity ([\d.]+)", out)
    assert told and float(told[1]) == pytest.approx(expected, abs=0.01)
    shown = re.findall(r"([\d.]+)%   of '.*?' ([\d.]+)%", out.split("the reply")[1])
    assert len(shown) == 8 and all(abs(float(p) - float(best)) < 0.06 for p, best in shown)


def test_a_batch_says_what_each_prompt_says_alone(model: Model) -> None:
    out = run("batch", str(TINY_QWEN3))
    for prompt in ("def add(a, b):", "class Queue:\n"):
        alone = model.generate(model.tokenizer.encode(prompt), 24, temperature=0)
        assert prompt + "".join(event.text for event in alone) + "\n---" in out


def test_choose_prefers_what_fits() -> None:
    scores = re.findall(r"' (\w+):' +(-[\d.]+) nats", run("choose", str(TINY_QWEN3)))
    assert [answer for answer, _ in scores] == ["KeyError", "ValueError", "ZeroDivisionError", "banana"]


def test_search_puts_the_nearest_text_first(model: Model) -> None:
    out = run("search", str(TINY_QWEN3), "what is a star?").splitlines()
    assert out[0] == "what is a star?" and len(out) == 6
    found = [(float(line[:7]), ast.literal_eval(line[9:])) for line in out[1:]]
    assert found == sorted(found, key=lambda item: item[0], reverse=True)
    query = model.embed([instruct("what is a star?")])[0]
    for similarity, text in found:
        assert similarity == pytest.approx(float(model.embed([text])[0] @ query), abs=1e-4)


def test_every_example_runs_on_another_model_and_is_tested(tmp_path: Path) -> None:
    path = str(export_small_model(tmp_path))
    tested = set(re.findall(r'run\("(\w+)"', Path(__file__).read_text()))
    for example in EXAMPLES.glob("*.py"):
        assert example.stem in tested
        assert run(example.stem, path)
