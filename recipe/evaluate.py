#!/usr/bin/env python3
"""What each stage of the model in the box can do, on data that none was trained on.

    python recipe/evaluate.py --base build/base --sft build/sft --grpo build/grpo --data build/box

A stage is a Hugging Face directory or a model.bin; replies come from the INT8 engine. It prints a table:

functions parse (text)
    share of 100 held-out headers with docstring whose greedy completion as plain text parses. The model reads
    the header and writes up to 256 tokens; the completion is cut before the first line that starts at the
    margin (not with a blank). One that ends its text earlier is taken whole, and so is one that never reaches
    such a line, its last, perhaps unfinished line included. Header and completion together must satisfy
    `ast.parse` and have a statement besides the docstring, so writing nothing does not count.
functions parse (chat)
    the same headers as the message "Complete this function:"; the whole reply, nothing cut, must parse and
    begin with a function that has a statement besides its docstring.
docstring F1
    mean over 200 held-out questions about code of the token F1 between the reply (greedy, at most 64 tokens)
    and the first sentence of the definition's docstring: words in lower case, counted with repetition, F1 = 2
    common / (words of reply + words of reference). Every stage is given the same chat prompt.
    Beside it the share of replies that end their turn, and the F1 of answering with the words of the
    definition's own name, which takes no model.
sums: reward, right
    on 200 held-out problems: mean of rewards.arithmetic over 4 replies each, sampled at temperature 1 with
    fixed seeds (at most 96 tokens), and share of greedy replies with reward 1.
functions: reward
    mean of rewards.function over 4 replies each to the 100 headers as messages, sampled in the same way (at
    most 256 tokens).
perplexity
    of the validation text, INT8 engine against transformers in float32 with the directory's own weights, over
    the same windows of the model's context (only for a directory; needs torch and transformers).
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import functions
import rewards

from qwen3c import Model
from qwen3c.convert.export import export
from qwen3c.convert.source import SourceError
from qwen3c.drivers.sampler import Sampling
from qwen3c.format import ModelFileError
from qwen3c.inspect.perplexity import Perplexity, measure

FUNCTION_TOKENS, ANSWER_TOKENS, SUM_TOKENS = 256, 64, 96  # the longest reply of each kind
SAMPLES = 4  # replies to each problem at temperature 1
END_OF_TEXT = "<|endoftext|>"
PROMPTS = [
    "Hello!", "Who are you?", "What can you do?", "What does textwrap.wrap do?",
    "Write the signature of shutil.copyfile.",
    "Complete this function:\n\ndef is_even(n):\n    \"\"\"Return True if n is even.\"\"\"",
    "Write a function: Return the last line of a file.", "Which module has OrderedDict?", "What is 27 + 45?",
    "Sort 31, 4 and 15.", "What is the capital of France?", "Thanks, goodbye",
]  # fmt: skip
OPENINGS = ["def", "class Stack:\n", "import os\n\ndef read_lines(path):\n"]


# ----------------------------------------------------------------------------
# Replies


def reply(
    model: Model, prompt: Sequence[int], max_tokens: int, temperature: float = 0.0, seed: int = 0
) -> tuple[str, bool]:
    """The model's text after `prompt`, from its whole distribution, and whether it ended by itself."""
    generation = model.generate(prompt, max_tokens, **vars(Sampling(temperature=temperature, seed=seed)))
    for _ in generation:
        pass
    return generation.reply.text, generation.reply.finish_reason == "stop"


def chat_reply(
    model: Model, messages: list[dict[str, str]], max_tokens: int, **sampling: Any
) -> tuple[str, bool]:
    return reply(model, model.chat_prompt(messages), max_tokens, **sampling)


def before_margin(text: str) -> str:
    """`text` up to the first line that starts at the margin; it goes on inside an indented block."""
    margin = re.search(r"^(?=\S)", text, re.MULTILINE)
    return text[: margin.start()] if margin else text


# ----------------------------------------------------------------------------
# Measurements, each of one model


def functions_in_text(model: Model, headers: list[dict[str, str]]) -> float:
    whole = 0
    for line in headers:
        text, _ = reply(model, model.tokenizer.encode(line["header"]), FUNCTION_TOKENS)
        whole += functions.has_body(line["header"] + before_margin(text))
    return whole / len(headers)


def function_task(line: dict[str, str]) -> dict[str, Any]:
    """A held-out header as a message, with what rewards.function looks for in the reply."""
    name, parameters = functions.name_and_parameters(line["header"] + line["body"])
    content = f"Complete this function:\n\n{line['header'].rstrip()}"
    message = {"role": "user", "content": content}
    return {"messages": [message], "function": name, "parameters": parameters}


def functions_in_chat(model: Model, tasks: list[dict[str, Any]]) -> float:
    replies = [chat_reply(model, task["messages"], FUNCTION_TOKENS)[0] for task in tasks]
    return sum(map(functions.has_body, replies)) / len(tasks)


def words(text: str) -> Counter[str]:
    return Counter(re.findall(r"\w+", text.lower()))


def token_f1(said: str, reference: str) -> float:
    a, b = words(said), words(reference)
    return 2 * (a & b).total() / max((a + b).total(), 1)


def name_as_words(name: str) -> str:
    """BaseServer.get_request -> get request"""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|_", " ", name.rpartition(".")[2])


def explanations(model: Model, questions: list[dict[str, Any]]) -> dict[str, float]:
    replies = [chat_reply(model, line["messages"], ANSWER_TOKENS) for line in questions]
    f1 = [token_f1(said, line["answer"]) for (said, _), line in zip(replies, questions, strict=True)]
    return {"docstring_f1": sum(f1) / len(f1), "ended": sum(ended for _, ended in replies) / len(replies)}


def rewards_of(
    model: Model, tasks: list[dict[str, Any]], max_tokens: int, n: int, temperature: float, seed: int
) -> list[float]:
    """The mean reward of n replies to each task."""
    found = []
    for i, task in enumerate(tasks):
        for s in range(seed, seed + n):
            said, ended = chat_reply(
                model, task["messages"], max_tokens, temperature=temperature, seed=i * 1000 + s
            )
            found.append(rewards.either(task["messages"], said, {**task, "ended": ended}))
    return found


def sums(model: Model, tasks: list[dict[str, Any]], seed: int) -> dict[str, float]:
    sampled = rewards_of(model, tasks, SUM_TOKENS, SAMPLES, 1.0, seed)
    greedy = rewards_of(model, tasks, SUM_TOKENS, 1, 0.0, seed)
    return {
        "reward": sum(sampled) / len(sampled),
        "sampled_right": sum(r == 1 for r in sampled) / len(sampled),
        "greedy_right": sum(r == 1 for r in greedy) / len(greedy),
    }


def text_ids(model: Model, folder: Path) -> list[int]:
    """The documents of a folder as tokens, each ended by the end-of-text token if there is one."""
    end = model.tokenizer.control_id(END_OF_TEXT)
    ids: list[int] = []
    for file in sorted(folder.iterdir()):
        ids += model.tokenizer.encode(file.read_text(encoding="utf-8"))
        ids += [] if end is None else [end]
    return ids


def float32_perplexity(directory: Path, ids: list[int], window: int, n_tokens: int) -> float:
    """qwen3c.inspect.perplexity by transformers in float32, over the first n_tokens of the vocabulary."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise SystemExit(
            f"evaluate.py: error: {error}; `make oracles` installs what perplexity is compared with"
        ) from None
    library: Any = transformers
    library.utils.logging.disable_progress_bar()
    model = library.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    result = Perplexity()
    for start in range(0, len(ids), window):
        part = torch.tensor(ids[start : start + window])
        if len(part) > 1:
            with torch.no_grad():
                logits = model(part[None, :-1]).logits[0, :, :n_tokens]
            nats = torch.nn.functional.cross_entropy(logits, part[1:], reduction="sum").item()
            result = Perplexity(result.nats + nats, result.tokens + len(part) - 1)
    return result.perplexity


def perplexities(model: Model, source: Path, folder: Path) -> dict[str, float]:
    ids, window = text_ids(model, folder), model.config.context
    found = {"perplexity": measure(model, ids, window).perplexity}
    if source.is_dir():
        found["float32_perplexity"] = float32_perplexity(source, ids, window, model.config.n_tokens)
        found["perplexity_change"] = found["perplexity"] / found["float32_perplexity"] - 1
    return found


def transcripts(model: Model) -> list[dict[str, str]]:
    """Greedy replies to fixed messages, and continuations of fixed openings."""
    talks = [
        {"user": p, "assistant": chat_reply(model, [{"role": "user", "content": p}], FUNCTION_TOKENS)[0]}
        for p in PROMPTS
    ]
    texts = [{"text": o + reply(model, model.tokenizer.encode(o), 128)[0]} for o in OPENINGS]
    return talks + texts


# ----------------------------------------------------------------------------
# All of it


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def evaluate(source: Path, data: Path, seed: int, limit: int) -> dict[str, Any]:
    """Every figure of one stage. limit: how many held-out items of each kind."""
    with tempfile.TemporaryDirectory() as scratch:
        path = source
        if source.is_dir():
            path = Path(scratch) / "model.bin"
            export(source, path)
        model = Model(str(path))
        headers = read_lines(data / "headers_validation.jsonl")[:limit]
        asked = [function_task(line) for line in headers]
        sampled = rewards_of(model, asked, FUNCTION_TOKENS, SAMPLES, 1.0, seed)
        return {
            "model": source.name,
            "functions_in_text": functions_in_text(model, headers),
            "functions_in_chat": functions_in_chat(model, asked),
            "function_reward": sum(sampled) / len(sampled),
            **explanations(model, read_lines(data / "questions_validation.jsonl")[:limit]),
            **sums(model, read_lines(data / "tasks_validation.jsonl")[:limit], seed),
            **perplexities(model, source, data / "text" / "validation"),
            "samples": transcripts(model),
        }


ROWS = [
    ("functions parse (text)", "functions_in_text", ".0%"),
    ("functions parse (chat)", "functions_in_chat", ".0%"),
    ("functions: mean reward at temperature 1", "function_reward", ".3f"),
    ("docstring F1", "docstring_f1", ".3f"),
    ("replies that end", "ended", ".0%"),
    ("sums: mean reward at temperature 1", "reward", ".3f"),
    ("sums: right at temperature 1", "sampled_right", ".1%"),
    ("sums: right, greedy", "greedy_right", ".1%"),
    ("perplexity, INT8 engine", "perplexity", ".4f"),
    ("perplexity, transformers float32", "float32_perplexity", ".4f"),
    ("INT8 to float32", "perplexity_change", "+.3%"),
]


def table(stages: dict[str, dict[str, Any]]) -> str:
    lines = ["| | " + " | ".join(stages) + " |", "|---" * (len(stages) + 1) + "|"]
    for title, key, form in ROWS:
        cells = [format(s[key], form) if math.isfinite(s.get(key, math.nan)) else "" for s in stages.values()]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Measure the stages of the model in the box on held-out data."
    )
    for stage in ("base", "sft", "grpo"):
        parser.add_argument(f"--{stage}", type=Path, help="Hugging Face directory or model.bin")
    parser.add_argument("--data", type=Path, required=True, help="what corpus.py wrote")
    parser.add_argument("--json", type=Path, help="write figures and samples here too")
    parser.add_argument("--seed", type=int, default=1, help="of the replies at temperature 1")
    parser.add_argument("--limit", type=int, default=200, help="held-out items of each kind (%(default)s)")
    args = parser.parse_args(argv)
    sources = {stage: getattr(args, stage) for stage in ("base", "sft", "grpo") if getattr(args, stage)}
    if not sources:
        parser.error("name at least one of --base, --sft and --grpo")
    try:
        questions = read_lines(args.data / "questions_validation.jsonl")[: args.limit]
        stages = {
            stage: evaluate(source, args.data, args.seed, args.limit) for stage, source in sources.items()
        }
    except (OSError, ModelFileError, SourceError, ValueError) as error:
        print(f"evaluate.py: error: {error}", file=sys.stderr)
        return 2
    by_name = sum(token_f1(name_as_words(q["name"]), q["answer"]) for q in questions) / len(questions)
    print(table(stages))
    print(f"\nDocstring F1 of the definition's name alone: {by_name:.3f}")
    if args.json:
        record = {"name_alone_f1": by_name, "stages": stages}
        args.json.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
