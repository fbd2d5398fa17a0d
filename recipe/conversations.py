"""Questions and answers about the definitions of a library, as messages to learn chat from."""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from random import Random

from functions import Definition

LONGEST_SAMPLE = 1500  # characters of all messages: about a context of 512 tokens
LONGEST_SOURCE = 450  # characters of code in a question about it
LONGEST_DOCSTRING = 400  # characters of a docstring in a question
LONGEST_FUNCTION = 40  # lines to write in an answer
EVERYDAY = """argparse base64 bisect calendar collections contextlib copy csv dataclasses datetime difflib
    enum fnmatch fractions functools glob gzip hashlib heapq html inspect json keyword logging operator os
    os.path pathlib pickle platform pprint queue random re secrets shelve shlex shutil socket statistics
    string subprocess tempfile textwrap threading timeit traceback types typing unittest urllib.parse
    urllib.request uuid warnings webbrowser zipfile""".split()
# modules that people ask about most: each of their definitions is asked about in several ways
EVERYDAY_FORMS = 5
SAME_ANSWER = 3  # definitions that may share a first sentence; further ones teach nothing

WHAT_BY_NAME = [
    "What does {name} do?", "What does the {kind} {name} do?", "Explain {name}.", "What is {name} for?",
    "What does {short} of the module {module} do?", "Describe the {kind} {short} of {module}.",
    "Tell me what {name} does.", "what does {name} do",
]  # fmt: skip
WHAT_OF_CODE = [
    "What does this {kind} do?\n\n{code}", "Explain this {kind}:\n\n{code}",
    "Describe this {kind} in one sentence:\n\n{code}",
    "{code}\n\nWhat does this {kind} do?", "Write a docstring for this {kind}:\n\n{code}",
    "What is this for?\n\n{code}",
]  # fmt: skip
COMPLETE = [
    "Complete this function:\n\n{code}", "Complete this function.\n\n{code}",
    "Write the body of this function:\n\n{code}",
    "Finish this function:\n\n{code}", "{code}", "Complete:\n\n{code}",
]  # fmt: skip
WRITE = [
    "Write a function: {sentence}", "Write a Python function that does this: {sentence}",
    "Write the function {short}. {sentence}",
]  # fmt: skip
SIGNATURE = [
    "Write the signature of {name}.", "What is the signature of {name}?", "What arguments does {name} take?",
    "What are the parameters of {name}?", "How is {name} called?", "Signature of {name}?",
]  # fmt: skip
HEADER = [
    "Write a header for this function: {sentence}",
    "Write the signature of a function that does this: {sentence}",
    "What could this function be called? {sentence}",
]  # fmt: skip
WHICH_MODULE = [
    "Which module has {short}?", "Where is {short} defined?", "In which module is the {kind} {short}?",
    "Which module do I import to use {short}?",
]  # fmt: skip
MODULE = [
    "What is the module {module} for?", "What does the module {module} do?", "What is {module}?",
    "Explain the module {module}.",
    "Describe {module}.",
]  # fmt: skip
CONTENTS = [
    "Name three functions of {module}.", "Which functions are in {module}?", "What can I call in {module}?",
    "List some functions of the module {module}.",
]  # fmt: skip
THANKS = [("Thanks", "You are welcome!"), ("Thank you!", "You are welcome!"), ("Bye", "Goodbye!")]
SYSTEM = "You are a helpful assistant."


@dataclass(frozen=True)
class Sample:
    """One conversation; `turns` alternate between user and assistant."""

    kind: str
    turns: tuple[str, ...]
    system: str = ""

    @property
    def characters(self) -> int:
        return len(self.system) + sum(map(len, self.turns))

    def messages(self) -> list[dict[str, str]]:
        roles = ("user", "assistant")
        spoken = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(self.turns)]
        return ([{"role": "system", "content": self.system}] if self.system else []) + spoken

    def line(self) -> str:
        return json.dumps({"kind": self.kind, "messages": self.messages()}, ensure_ascii=False)


def full_name(definition: Definition) -> str:
    return f"{definition.module}.{definition.name}"


def ask(forms: list[str], definition: Definition, random: Random, code: str = "") -> str:
    return random.choice(forms).format(
        name=full_name(definition),
        short=definition.name,
        module=definition.module,
        kind=definition.kind,
        sentence=definition.sentence,
        code=code,
    )


def header_with_docstring(definition: Definition) -> str:
    """The function up to its body: `def wrap(text):` and the docstring under it."""
    docstring = definition.docstring.replace("\\", "\\\\").replace('"""', "'''")
    text = textwrap.indent(f'"""{docstring}"""', "    ", lambda line: bool(line.strip()))
    return f"{definition.header}\n{text}"


def is_short(definition: Definition) -> bool:
    """Whether the function can be an answer as a whole."""
    return bool(definition.body) and definition.code.count("\n") < LONGEST_FUNCTION


def shown_code(definition: Definition) -> str:
    """What a question about a definition shows of it: all of a short function, else the header."""
    shown = definition.code if definition.body else definition.header
    return shown if len(shown) <= LONGEST_SOURCE else definition.header


# ----------------------------------------------------------------------------
# One question and its answer


def by_name(definition: Definition, random: Random) -> tuple[str, str]:
    answer = definition.sentence
    if definition.kind == "function" and random.random() < 0.5:
        answer += f"\n\n{definition.header}"
    return ask(WHAT_BY_NAME, definition, random), answer


def of_code(definition: Definition, random: Random) -> tuple[str, str]:
    return ask(WHAT_OF_CODE, definition, random, shown_code(definition)), definition.sentence


def completion(definition: Definition, random: Random) -> tuple[str, str]:
    """The answer is the whole function, its docstring left out."""
    if definition.docstring and len(definition.docstring) <= LONGEST_DOCSTRING and random.random() < 0.75:
        return ask(COMPLETE, definition, random, header_with_docstring(definition)), definition.code
    if definition.sentence and random.random() < 0.6:
        return ask(WRITE, definition, random), definition.code
    return ask(COMPLETE, definition, random, definition.header), definition.code


def signature(definition: Definition, random: Random) -> tuple[str, str]:
    return ask(SIGNATURE, definition, random), definition.header


def header(definition: Definition, random: Random) -> tuple[str, str]:
    return ask(HEADER, definition, random), definition.header


def which_module(definition: Definition, random: Random) -> tuple[str, str]:
    return ask(WHICH_MODULE, definition, random), f"{definition.name} is in the module {definition.module}."


# ----------------------------------------------------------------------------
# All of a library


def about_definitions(definitions: list[Definition], seed: int) -> Iterator[Sample]:
    """Samples about each definition; which, depends on the seed and its name alone."""
    seen: Counter[str] = Counter()
    modules = Counter(d.name for d in definitions if d.public and d.kind != "method")
    for definition in definitions:
        random = Random(f"{seed}:{full_name(definition)}")
        everyday = definition.module in EVERYDAY and definition.kind != "method"
        forms = EVERYDAY_FORMS if everyday else 1
        seen[definition.sentence] += 1
        if definition.sentence and seen[definition.sentence] <= SAME_ANSWER:
            if definition.public and random.random() < (0.5 if definition.kind == "method" else 1):
                for _ in range(forms):
                    yield Sample("what by name", by_name(definition, random))
            if random.random() < 0.8:
                yield Sample("what of code", of_code(definition, random))
            if definition.kind != "class" and random.random() < 0.2:
                yield Sample("header", header(definition, random))
        if is_short(definition) and random.random() < (0.4 if definition.docstring else 0.1):
            yield Sample("complete", completion(definition, random))
        if definition.public and definition.kind == "function" and "()" not in definition.header:
            for _ in range(forms):
                yield Sample("signature", signature(definition, random))
        if definition.public and definition.kind != "method" and modules[definition.name] == 1:
            for _ in range(3 if everyday else random.randrange(2)):
                yield Sample("which module", which_module(definition, random))


def about_modules(sentences: dict[str, str], definitions: list[Definition], seed: int) -> Iterator[Sample]:
    """What public modules are for and what is in them. sentences: of modules, by name."""
    contents: dict[str, list[str]] = {}
    for definition in definitions:
        if definition.public and definition.kind == "function":
            contents.setdefault(definition.module, []).append(definition.name)
    for module, sentence in sentences.items():
        random = Random(f"{seed}:{module}:module")
        if any(part.startswith("_") for part in module.split(".")):
            continue
        for form in random.sample(MODULE, 5 if module in EVERYDAY else 2) if sentence else []:
            yield Sample("module", (form.format(module=module), sentence))
        names = contents.get(module, [])
        if len(names) >= 3:
            chosen = ", ".join(names[:3])
            yield Sample(
                "module", (random.choice(CONTENTS).format(module=module), f"{chosen} are in {module}.")
            )


def in_several_turns(
    definitions: list[Definition],
    chatter: list[tuple[str, str]],
    sums: list[tuple[str, str]],
    count: int,
    seed: int,
) -> Iterator[Sample]:
    """Conversations of two to four exchanges, on one definition or on several things."""
    random = Random(f"{seed}:turns")
    described = [d for d in definitions if d.sentence and d.public and d.kind == "function"]
    for _ in range(count if described else 0):
        turns: list[str] = []
        if random.random() < 0.3:
            turns += random.choice(chatter)
        if random.random() < 0.6:
            definition = random.choice(described)
            turns += [ask(WHAT_BY_NAME, definition, random), definition.sentence]
            follow = random.random()
            if follow < 0.5:
                turns += [
                    random.choice(["What is its signature?", "And its signature?", "How is it called?"]),
                    definition.header,
                ]
            elif follow < 0.8 and is_short(definition) and len(definition.code) <= LONGEST_SOURCE:
                turns += [
                    random.choice(["Show me the code.", "Write it.", "How is it written?"]),
                    definition.code,
                ]
        else:
            for _ in range(random.randint(1, 3)):
                turns += random.choice(sums)
        if len(turns) < 4 or random.random() < 0.3:
            turns += random.choice(THANKS)
        yield Sample("several turns", tuple(turns))


def with_system(samples: Iterable[Sample], seed: int) -> Iterator[Sample]:
    """One sample in twenty begins with a system message, so that the model can cope with one."""
    random = Random(f"{seed}:system")
    for sample in samples:
        yield Sample(sample.kind, sample.turns, SYSTEM) if random.random() < 0.05 else sample
