"""The recipe of the model in the box: what it is trained on, what is held out, and how it is measured."""

from __future__ import annotations

import hashlib
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from small_models import export_small_model, write_small_model

from qwen3c.convert.huggingface import thinking_kind
from qwen3c.text.template import ChatTemplateError, Renderer
from qwen3c.training.vocabulary import CHAT_TEMPLATE

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipe"
sys.path.insert(0, str(RECIPE))  # its scripts import each other as scripts do

import arithmetic  # noqa: E402
import conversations  # noqa: E402
import corpus  # noqa: E402
import evaluate  # noqa: E402
import functions  # noqa: E402
import rewards  # noqa: E402
import talk  # noqa: E402

SEED = 3
VERBS = ["Open", "Close", "Read", "Write", "Find", "Remove", "Count", "Merge", "Split", "Reset"]
MODULE = '''\
"""Tools that {verb} the {name} of a file."""

import os

__all__ = ["{name}_path"]


def {name}_path(path, *, mode="r", flags=()):
    """{title} the {name} at path and say where it was.

    path: where to look.
    """
    # os.path does not care
    found = os.path.join(path, "{name}")
    return found, mode, flags


def {name}_all(paths):
    return [{name}_path(path) for path in paths]


def {name}_size(path): return len(path)


class {title}er:
    """An object that can {verb} {name} again and again."""

    def {verb}(self, count=1):
        """{title} it count times, {name} by {name}."""
        for _ in range(count):
            {name}_path(self)
'''


def write_library(folder: Path) -> Path:
    """A library of 120 modules in packages, with files that must be left out."""
    for i in range(120):
        verb = VERBS[i % len(VERBS)]
        file = folder / f"package{i % 7}" / f"module{i}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(
            MODULE.format(title=verb, verb=verb.lower(), name=f"thing{chr(97 + i // 26)}{chr(97 + i % 26)}")
        )
    (folder / "package0" / "__init__.py").write_text(
        '"""A package of things."""\n\nfrom .module0 import *\n' + "#" * 200
    )
    for name in (
        "test/test_module0.py",
        "package1/tests/case.py",
        "site-packages/other.py",
        "encodings/cp1.py",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(MODULE.format(title="Skip", verb="skip", name="skipped"))
    (folder / "broken.py").write_text("def broken(:\n" * 30)
    (folder / "latin.py").write_bytes(b"name = '\xe9'\n" * 30)
    (folder / "data.py").write_text(
        "".join(f"x{i} = [\n" + "    0x1f, 0x2e,\n" * 9 + "]\n" for i in range(9))
    )
    return folder


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_library(tmp_path_factory.mktemp("library"))


@pytest.fixture(scope="module")
def data(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "box"
    assert corpus.main([str(out), "--source", str(library), "--seed", str(SEED)]) == 0
    return out


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def conversation_lines(path: Path) -> list[dict[str, Any]]:
    """The conversations of a file, without its plain text."""
    return [line for line in lines(path) if "messages" in line]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_the_same_library_and_seed_give_the_same_bytes(library: Path, data: Path, tmp_path: Path) -> None:
    stale = tmp_path / "box" / "text" / "train" / "stale.py"
    stale.parent.mkdir(parents=True)
    stale.write_text("left over\n")
    command = [sys.executable, str(RECIPE / "corpus.py"), str(tmp_path / "box"), "--source", str(library)]
    subprocess.run(
        [*command, "--seed", str(SEED)], check=True, capture_output=True, env={"PYTHONHASHSEED": "7"}
    )
    assert contents(tmp_path / "box") == contents(data)
    subprocess.run([*command, "--seed", str(SEED + 1)], check=True, capture_output=True)
    assert contents(tmp_path / "box")["chat.jsonl"] != contents(data)["chat.jsonl"]


def test_the_split_is_by_document_and_leaves_out_what_is_not_library_code(library: Path, data: Path) -> None:
    train = {f.name: f.read_text() for f in (data / "text" / "train").iterdir()}
    validation = {f.name: f.read_text() for f in (data / "text" / "validation").iterdir()}
    modules = {name: text for name, text in train.items() if not name.endswith(".functions.py")}
    assert len(modules) + len(validation) == 121  # 120 modules and a package's
    assert (
        validation and not set(train) & set(validation) and not set(train.values()) & set(validation.values())
    )
    for name in validation:
        path = next(
            p for p in library.rglob("*.py") if p.relative_to(library).as_posix().replace("/", ".") == name
        )
        assert corpus.is_validation(path.relative_to(library).as_posix(), SEED)
    assert not any("skipped" in text for text in [*train.values(), *validation.values()])


def test_the_share_held_out_is_what_was_asked_for() -> None:
    held_out = sum(corpus.is_validation(f"module{i}.py", SEED) for i in range(4000))
    assert abs(held_out / 4000 - corpus.VALIDATION_SHARE) < 0.01


def test_text_is_code_without_tabs_trailing_blanks_or_tables() -> None:
    table = "TABLE = {\n" + "".join(f"    {i}: 'x{i}',\n" for i in range(50)) + "}\n"
    text = corpus.normalise(f"import os   \n\n\n\n\n\n{table}\n\ndef f():\n\treturn os\n")
    assert text == "import os\n\n\ndef f():\n        return os\n"
    assert corpus.normalise("x = 1\n" + "(0x1f, 12,\n 'ab')\n" * 20) is None
    assert corpus.normalise("def f(:\n") is None


def test_every_conversation_ends_with_an_answer_and_fits(data: Path) -> None:
    for name in ("chat.jsonl", "chat_validation.jsonl"):
        samples = conversation_lines(data / name)
        assert len({s["kind"] for s in samples}) >= 11
        for sample in samples:
            messages = [m for m in sample["messages"] if m["role"] != "system"]
            assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2) and messages
            assert all(m["content"].strip() for m in messages)
            assert sum(len(m["content"]) for m in messages) <= conversations.LONGEST_SAMPLE


def test_conversations_are_about_the_documents_of_their_side(data: Path) -> None:
    names = {
        side: set(
            re.findall(
                r"thing[a-z]{2}(?=_path)", "".join(f.read_text() for f in (data / "text" / side).iterdir())
            )
        )
        for side in ("train", "validation")
    }
    for name, other in (("chat.jsonl", "validation"), ("chat_validation.jsonl", "train")):
        spoken = (data / name).read_text()
        assert not [thing for thing in names[other] if thing in spoken]


def test_completed_functions_parse_and_have_no_docstring(data: Path) -> None:
    answers = [
        s["messages"][-1]["content"]
        for s in conversation_lines(data / "chat.jsonl")
        if s["kind"] == "complete"
    ]
    assert answers
    for answer in answers:
        assert functions.has_body(answer) and '"""' not in answer


def test_sums_are_right_and_no_problem_is_in_two_sets(data: Path) -> None:
    def canonical(equation: str) -> tuple[str, ...]:
        a, operator, b = equation.split()
        return (a, operator, b) if operator == "-" else (operator, *sorted((a, b)))

    shown = set()
    for name in ("chat.jsonl", "chat_validation.jsonl"):
        for sample in conversation_lines(data / name):
            for message in sample["messages"]:
                found = re.search(r"(?:^|: )(\d+ [-+*] \d+) = (\d+)$", message["content"])
                if found and message["role"] == "assistant":
                    assert eval(found[1]) == int(found[2])
                    if name == "chat.jsonl":
                        shown.add(canonical(found[1]))
    asked = {}
    for name in ("tasks.jsonl", "tasks_validation.jsonl"):
        tasks = lines(data / name)
        for task in tasks:
            assert eval(task["equation"]) == int(task["answer"])
            numbers = re.findall(r"\d+", task["messages"][-1]["content"])
            assert sorted(numbers) == sorted(re.findall(r"\d+", task["equation"]))
        asked[name] = {canonical(task["equation"]) for task in tasks}
        assert len(asked[name]) == len(tasks)
    assert len(shown) > 12_000
    assert not shown & asked["tasks.jsonl"] and not shown & asked["tasks_validation.jsonl"]
    assert not asked["tasks.jsonl"] & asked["tasks_validation.jsonl"]


@pytest.mark.parametrize("use", ["chat", "tasks", "validation"])
def test_each_use_has_sums_and_differences(use: arithmetic.Use) -> None:
    found = arithmetic.problems(use, SEED)
    assert {p.operator for p in found} >= {"+", "-"} and all(p.answer >= 0 for p in found)
    assert {p.use(SEED) for p in found} == {use}


@pytest.mark.parametrize(
    "problem, solution",
    [
        (arithmetic.Problem(3, "+", 4), "3 + 4 = 7"),
        (arithmetic.Problem(12, "*", 11), "12 * 11 = 132"),
        (arithmetic.Problem(27, "+", 45), "7 + 5 = 12, 2 + 4 + 1 = 7: 27 + 45 = 72"),
        (arithmetic.Problem(97, "+", 45), "7 + 5 = 12, 9 + 4 + 1 = 14: 97 + 45 = 142"),
        (arithmetic.Problem(302, "-", 17), "12 - 7 = 5, 9 - 1 = 8, 2 - 0 = 2: 302 - 17 = 285"),
    ],
)
def test_an_answer_works_from_the_right_before_it_says_the_result(
    problem: arithmetic.Problem, solution: str
) -> None:
    assert problem.solution == solution


def test_every_step_of_the_working_is_right_and_its_last_digits_are_the_result() -> None:
    for problem in arithmetic.problems("chat", SEED)[:3000]:
        working, _, _ = problem.solution.rpartition(": ")
        digits = ""
        for step in working.split(", ") if working else []:
            left, right = step.split(" = ")
            assert eval(left) == int(right)
            digits = right[-1] + digits
        if working:
            assert str(problem.answer).zfill(len(digits)).endswith(digits)


def test_other_answers_about_numbers_are_right() -> None:
    from random import Random

    random = Random(1)
    for _ in range(200):
        question, answer = arithmetic.comparison(random)
        a, b = map(int, re.findall(r"\d+", question))
        if question.startswith("Is"):
            holds = a > b if "greater" in question else a < b
            assert answer == f"{'Yes' if holds else 'No'}, {a} is {'greater' if a > b else 'less'} than {b}."
        else:
            assert answer == (
                f"{max(a, b)} is larger." if "larger" in question else f"{min(a, b)} is smaller."
            )
        question, answer = arithmetic.sorting(random)
        assert [int(n) for n in answer.split(", ")] == sorted(map(int, re.findall(r"\d+", question)))


def test_what_is_held_out_comes_from_validation_documents(data: Path) -> None:
    training_text = "".join(f.read_text() for f in (data / "text" / "train").iterdir())
    chat = (data / "chat.jsonl").read_text()
    headers, questions = lines(data / "headers_validation.jsonl"), lines(data / "questions_validation.jsonl")
    assert headers and questions
    for line in [*headers, *questions]:
        assert corpus.is_validation(line["path"], SEED)
        assert (data / "text" / "validation" / line["path"].replace("/", ".")).is_file()
    for line in headers:
        assert functions.has_body(line["header"] + line["body"]) and not functions.has_body(line["header"])
        assert line["header"] not in training_text
    for line in questions:
        assert line["answer"].rstrip(".") not in training_text and line["answer"] not in chat


def test_the_manifest_lists_every_document_and_file(data: Path) -> None:
    manifest = json.loads((data / "manifest.json").read_text())
    assert manifest["seed"] == SEED and manifest["python"] == sys.version.split()[0].rstrip("+")
    for path, entry in manifest["documents"].items():
        text = (data / "text" / entry["split"] / path.replace("/", ".")).read_bytes()
        assert (entry["bytes"], entry["sha256"]) == (len(text), hashlib.sha256(text).hexdigest())
    assert set(manifest["files"]) == {f.name for f in data.glob("*.jsonl")}


@pytest.mark.parametrize(
    "docstring, sentence",
    [
        ("Return the size of a file.", "Return the size of a file."),
        ("return the size\n    of a file", "Return the size of a file."),
        ("size(path) -> int\n\nReturn the size of a file. Slow.", "Return the size of a file."),
        ("Split it, e.g. at blanks, into parts. Then stop.", "Split it, e.g. at blanks, into parts."),
        ("See :meth:`wait` and ``stop`` for more:", "See wait and stop for more."),
        ("self * other", ""),
        ("Stub.", ""),
        ("", ""),
        (">>> size('x')\n12", ""),
    ],
)
def test_the_first_sentence_of_a_docstring(docstring: str, sentence: str) -> None:
    assert functions.first_sentence(docstring) == sentence


def test_definitions_have_one_line_headers_and_whole_bodies() -> None:
    text = '''\
@decorated
async def fetch(
    url,  # where
    *, timeout: float = 1.0,
) -> bytes:
    """Fetch what is at url."""
    # slowly
    if url:
        return b""
    return None


class Box(dict, metaclass=Meta):
    """A box of things that are named."""

    def one(self): return 1

    def two(self):
        """Only a docstring in here."""
'''
    fetch, box, one, two = functions.definitions("package/tools.py", text, {})
    assert fetch.header == "async def fetch(url, *, timeout: float=1.0) -> bytes:"
    assert fetch.body == '    # slowly\n    if url:\n        return b""\n    return None'
    assert (fetch.module, fetch.name, fetch.kind) == ("package.tools", "fetch", "function")
    assert (box.header, box.kind) == ("class Box(dict, metaclass=Meta):", "class")
    assert (one.name, one.body, two.body) == ("Box.one", "", "")


def test_definitions_go_by_the_name_under_which_they_are_passed_on() -> None:
    texts = {
        "web/__init__.py": "from .client import *\nfrom .server import serve as run\nfrom os import path\n",
        "web/client.py": "__all__ = ('get',)\ndef get(): pass\ndef put(): pass\n",
        "web/server.py": "def serve(): pass\n",
        "_fast.py": "__all__ = ['sort']\n",
        "slow.py": "try:\n    from _fast import *\nexcept ImportError:\n    pass\n",
    }
    assert functions.public_homes(texts) == {
        "web.client.get": "web",
        "web.server.serve": "web",
        "_fast.sort": "slow",
    }


TASK = {"answer": "82", "equation": "37 + 45", "ended": True}


@pytest.mark.parametrize(
    "completion, reward",
    [
        ("37 + 45 = 82", 1.0),
        ("7 + 5 = 12, 3 + 4 + 1 = 8: 37 + 45 = 82", 1.0),
        ("37 + 45 = 82: 7 + 5 = 12", 0.0),
        ("82", 1.0),
        (" 82.\n", 1.0),
        ("37 + 45 = 72", 0.2),
        ("83", 0.2),
        ("28", 0.0),
        ("182", 0.0),
        ("8", 0.0),
        ("37 + 44 = 82", 0.0),
        ("37 + 45 = 82 or 83", 0.0),
        ("-82", 0.0),
        ("٨٢", 0.0),
        ("", 0.0),
    ],
)
def test_only_the_right_answer_has_the_whole_reward(completion: str, reward: float) -> None:
    assert rewards.arithmetic("", completion, TASK) == reward
    assert rewards.arithmetic("", completion, {**TASK, "ended": False}) == 0


FUNCTION = {"function": "add", "parameters": ["a", "b"], "ended": True}


@pytest.mark.parametrize(
    "completion, reward",
    [
        ("def add(a, b):\n    return a + b", 1.0),
        ('def add(a, b):\n    """Add."""\n    return sum([b, a])', 1.0),
        ("def add(a, b):\n    return sum(c)", 0.5),
        ("def add(a, b):\n    return a", 0.0),
        ("def add(a, b):\n    return None", 0.0),
        ("def add(a, b):\n    return", 0.0),
        ('def add(a, b):\n    """Add."""', 0.0),
        ("def add(a, b):\n    pass", 0.0),
        ("def sum(a, b):\n    return a + b", 0.0),
        ("def add(a, b):\n    return a +", 0.0),
        ("def add(a, b):\n    return a\nprint(add)", 0.0),
        ("def add(a, b):\n" + "    a = b\n" * 3, 0.0),
        ("add(a, b)", 0.0),
        ("", 0.0),
    ],
)
def test_a_function_is_rewarded_for_being_whole_and_using_what_it_is_given(
    completion: str, reward: float
) -> None:
    assert rewards.either("", completion, FUNCTION) == reward
    assert rewards.either("", completion, {**FUNCTION, "ended": False}) == 0


def test_functions_rehearsed_as_text_are_of_training_documents(data: Path) -> None:
    training = {f.name: f.read_text() for f in (data / "text" / "train").glob("*.functions.py")}
    rehearsed = [line["text"] for line in lines(data / "chat.jsonl") if "text" in line]
    assert rehearsed and all(functions.has_body(text) for text in rehearsed)
    assert all(any(text in whole for whole in training.values()) for text in rehearsed)


def test_functions_to_complete_come_from_training_text_with_a_reply_worth_the_whole_reward(
    data: Path,
) -> None:
    tasks = lines(data / "functions.jsonl")
    replies = {
        s["messages"][-2]["content"]: s["messages"][-1]["content"]
        for s in conversation_lines(data / "chat.jsonl")
    }
    values = [rewards.function("", replies[t["messages"][0]["content"]], {**t, "ended": True}) for t in tasks]
    assert tasks and sum(values) / len(values) > 0.5


def test_a_wrong_answer_of_one_digit_has_none() -> None:
    assert rewards.arithmetic("", "7", {"answer": "8", "equation": "4 + 4", "ended": True}) == 0


def test_small_talk_names_the_size_it_is_told() -> None:
    answers = {answer for _, answer in talk.exchanges("9 million")}
    assert any("about 9 million parameters" in answer for answer in answers)
    assert not any("{" in text for exchange in talk.exchanges("9 million") for text in exchange)


# ----------------------------------------------------------------------------
# Chat template


def render(messages: list[dict[str, str]], **variables: Any) -> str:
    return Renderer().render(CHAT_TEMPLATE, {"messages": messages, **variables})


def test_a_conversation_begins_with_the_prompt_it_came_from() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi\n"},
        {"role": "assistant", "content": " Hello {{ you }}"},
        {"role": "user", "content": "1 + 1"},
        {"role": "assistant", "content": "2"},
    ]
    for start in (0, 1):
        for k in (2, 4):
            prompt = render(messages[start:k], add_generation_prompt=True)
            assert prompt.endswith("<|im_start|>assistant\n")
            assert render(messages[start : k + 1]) == f"{prompt}{messages[k]['content']}<|im_end|>\n"
    assert render(messages[1:2]) == "<|im_start|>user\nHi\n<|im_end|>\n"


def test_the_template_neither_thinks_nor_calls_tools() -> None:
    messages = [{"role": "user", "content": "Hi"}]
    assert render(messages, enable_thinking=True) == render(messages)
    assert thinking_kind(CHAT_TEMPLATE) == "none"
    with pytest.raises(ChatTemplateError, match="calls no tools"):
        render(messages, tools=[{"name": "search"}])


# ----------------------------------------------------------------------------
# Measuring


@pytest.mark.parametrize(
    "text, kept",
    [
        ("    return 1\n\n    # more\nx = 1\n", "    return 1\n\n    # more\n"),
        ("    return 1\n", "    return 1\n"),
        ("return 1\n", ""),
        ("    return (", "    return ("),
        ("\n\n)\n", "\n\n"),
    ],
)
def test_a_completion_is_cut_before_the_first_line_at_the_margin(text: str, kept: str) -> None:
    assert evaluate.before_margin(text) == kept


@pytest.mark.parametrize(
    "code, whole",
    [
        ('def f():\n    """Doc."""\n    return 1\n', True),
        ("def f():\n    pass\n", True),
        ('def f():\n    """Doc."""\n', False),
        ("def f():\n    return (\n", False),
        ("x = 1\n", False),
        ("", False),
        ("def f():\n    x = '\0'\n", False),
        ("def f():\n    return " + "(" * 5000, False),
    ],
)
def test_a_function_counts_when_it_parses_and_does_something(code: str, whole: bool) -> None:
    assert functions.has_body(code) is whole


def test_f1_of_words() -> None:
    assert evaluate.token_f1("Return the size.", "return The SIZE") == 1
    assert evaluate.token_f1("the the the", "the size") == pytest.approx(2 / 5)
    assert evaluate.token_f1("", "the size") == evaluate.token_f1("", "") == 0
    assert evaluate.name_as_words("BaseServer.get_requestName") == "get request Name"


@pytest.fixture(scope="module")
def few(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The held-out data with a short validation text."""
    folder = tmp_path_factory.mktemp("few")
    for name in ("headers", "questions", "tasks"):
        (folder / f"{name}_validation.jsonl").write_bytes((data / f"{name}_validation.jsonl").read_bytes())
    (folder / "text" / "validation").mkdir(parents=True)
    for name in ("a.py", "b.py"):
        (folder / "text" / "validation" / name).write_text(
            "import os\n\n\ndef f(x):\n    return os.stat(x)\n" * 8
        )
    return folder


def test_every_stage_is_measured_and_the_same_model_gives_the_same_figures(
    few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(export_small_model(tmp_path, thinking="none", context=2048))
    figures = tmp_path / "figures.json"
    assert (
        evaluate.main(
            ["--base", path, "--sft", path, "--data", str(few), "--json", str(figures), "--limit", "2"]
        )
        == 0
    )
    stages = json.loads(figures.read_text())["stages"]
    assert stages["base"] == stages["sft"] and set(stages) == {"base", "sft"}
    for _, key, _ in evaluate.ROWS[:9]:
        assert math.isfinite(stages["base"][key])
    assert len(stages["base"]["samples"]) == len(evaluate.PROMPTS) + len(evaluate.OPENINGS)
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "| | base | sft |"
    assert f"| perplexity, INT8 engine | {stages['base']['perplexity']:.4f} |" in shown[10]


def test_perplexity_is_measured_on_the_windows_that_transformers_is_given(few: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="needs torch; `make oracles` installs it")
    transformers = pytest.importorskip(
        "transformers", reason="needs transformers; `make oracles` installs it"
    )
    model = evaluate.Model(str(export_small_model(tmp_path)), kv="f32", activations="float32")  # type: ignore[attr-defined]
    same = transformers.AutoModelForCausalLM.from_pretrained(
        write_small_model(tmp_path / "a"), dtype=torch.float32
    )
    with torch.no_grad():
        for name, parameter in same.named_parameters():
            parameter.copy_(torch.from_numpy(model.weight(name)))
    same.save_pretrained(tmp_path / "b")
    found = evaluate.perplexities(model, tmp_path / "b", few / "text" / "validation")
    assert len(evaluate.text_ids(model, few / "text" / "validation")) > 2 * model.config.context
    assert abs(found["perplexity_change"]) < 1e-5


def test_a_wrong_argument_is_one_line(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for main, arguments in (
        (corpus.main, [str(tmp_path / "out"), "--source", str(tmp_path / "empty")]),
        (corpus.main, [str(tmp_path / "out"), "--source", str(tmp_path / "missing")]),
        (evaluate.main, ["--sft", str(tmp_path / "missing.bin"), "--data", str(data)]),
        (evaluate.main, ["--sft", str(tmp_path / "empty"), "--data", str(data)]),
        (evaluate.main, ["--sft", str(tmp_path / "file"), "--data", str(data)]),
        (evaluate.main, ["--sft", str(tmp_path / "file"), "--data", str(tmp_path)]),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and str(tmp_path) in error
