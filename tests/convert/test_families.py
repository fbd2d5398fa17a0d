"""Llama 3 and DeepSeek: vocabularies built as theirs are, their begin-of-text, templates in their form.

python -m pytest tests/convert/test_families.py
QWEN3C_STRINGS=200000 python -m pytest tests/convert/test_families.py
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from small_models import tokenizer_json, write_json, write_small_model
from test_gguf import byte_level_tokenizer
from test_tokenizer import ESCAPE, of_choices, strings  # type: ignore[attr-defined]

from qwen3c import Model
from qwen3c.convert.directory import Directory
from qwen3c.convert.export import export
from qwen3c.convert.huggingface import Checkpoint
from qwen3c.convert.source import SourceError
from qwen3c.text.template import Renderer
from qwen3c.text.tokenizer import Tokenizer

N_STRINGS = int(os.environ.get("QWEN3C_STRINGS", 2000))

CONTROL = {  # token -> whether it is special
    "llama3": {"<|start_header_id|>": True, "<|end_header_id|>": True, "<|eom_id|>": True},
    "deepseek": {
        "<｜begin▁of▁sentence｜>": True,
        "<｜end▁of▁sentence｜>": True,
        "<｜▁pad▁｜>": True,
        "<｜User｜>": False,
        "<｜Assistant｜>": False,
        "<｜tool▁calls▁begin｜>": False,
    },
}
BEGIN = {"llama3": "<|begin_of_text|>", "deepseek": "<｜begin▁of▁sentence｜>"}

LLAMA3_TEMPLATE = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- set system = "" %}
{%- if messages[0]["role"] == "system" %}
    {%- set system = messages[0]["content"]|trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" + system + "<|eot_id|>" }}
{%- for message in messages %}
    {{- "<|start_header_id|>" + message["role"] + "<|end_header_id|>\\n\\n" + message["content"] | trim + "<|eot_id|>" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}
{%- endif %}
"""
DEEPSEEK_TEMPLATE = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{% set ns = namespace(system='') %}{%- for message in messages %}{%- if message['role'] == 'system' %}"
    "{% set ns.system = message['content'] %}{%- endif %}{%- endfor %}{{ bos_token }}{{ ns.system }}"
    "{%- for message in messages %}{%- if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{%- endif %}{%- if message['role'] == 'assistant' %}{% set said = message['content'] %}"
    "{% if '</think>' in said %}{% set said = said.split('</think>')[-1] %}{% endif %}"
    "{{ '<｜Assistant｜>' + said + '<｜end▁of▁sentence｜>' }}{%- endif %}{%- endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)
TEMPLATES = {"llama3": LLAMA3_TEMPLATE, "deepseek": DEEPSEEK_TEMPLATE}
CONVERSATIONS = [
    [{"role": "user", "content": "  What is 12345 + 678? \n"}],
    [{"role": "system", "content": "Be brief. é🎉"}, {"role": "user", "content": "你好 'x'"}],
    [
        {"role": "user", "content": "a < b & c"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"},
        {"role": "user", "content": ""},
    ],
]


@pytest.fixture(scope="module", params=CONTROL)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def data(family: str) -> str:
    """A tokenizer.json. Llama's adds begin-of-text; for DeepSeek tokenizer_config.json asks for it."""
    pre = byte_level_tokenizer("llama-bpe") if family == "llama3" else json.loads(tokenizer_json())
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(pre))
    for content, special in CONTROL[family].items():
        tokenizer.add_tokens([tokenizers.AddedToken(content, normalized=False, special=special)])
    return tokenizer.to_str()


def write_source(directory: Path, family: str, data: str, **tokenizer_config: Any) -> Path:
    source = write_small_model(directory, architecture="llama", head_dim=16, vocab_size=2560, context=512)
    (source / "tokenizer.json").write_text(data, encoding="utf-8")
    given = {"bos_token": BEGIN[family], "chat_template": TEMPLATES[family]}
    write_json(source / "tokenizer_config.json", given | tokenizer_config)
    return source


@pytest.fixture(scope="module")
def model(family: str, data: str, tmp_path_factory: pytest.TempPathFactory) -> Model:
    directory = tmp_path_factory.mktemp(family)
    source = write_source(directory / "source", family, data, add_bos_token=True)
    export(source, directory / "model.bin")
    return Model(str(directory / "model.bin"))


def random_strings(family: str, seed: int) -> list[str]:
    pieces = [*CONTROL[family], BEGIN[family], "<｜", "｜>", "▁", "<|", "1234567", " 12", "Ġ", "\n"]
    extra, n = of_choices(pieces, 10), N_STRINGS // 8
    r = random.Random(seed)
    return strings(seed, N_STRINGS - n) + [extra(r) for _ in range(n)]


# ----------------------------------------------------------------------------
# Vocabularies


def test_tokens_are_those_of_the_source_tokenizer(family: str, data: str) -> None:
    tokenizer, source = Tokenizer(data.encode()), tokenizers.Tokenizer.from_str(data)
    unaware = tokenizers.Tokenizer.from_str(json.dumps(json.loads(data) | {"added_tokens": []}))
    texts = random_strings(family, 21)
    plain = unaware.encode_batch(texts, add_special_tokens=False)
    special = source.encode_batch(texts, add_special_tokens=False)
    for text, as_text, as_tokens in zip(texts, plain, special, strict=True):
        assert tokenizer.encode(text) == as_text.ids, repr(text)
        assert tokenizer.encode(text, special=True) == as_tokens.ids, repr(text)
        if ESCAPE not in text:
            assert tokenizer.encode_escaped(text) == as_tokens.ids, repr(text)
        assert tokenizer.decode(as_tokens.ids) == source.decode(as_tokens.ids, False), repr(text)


def test_llama_splits_digits_by_three_and_looks_whole_words_up() -> None:
    tokenizer = Tokenizer(json.dumps(byte_level_tokenizer("llama-bpe")).encode())
    assert tokenizer.decode(tokenizer.encode("98765")[:1]) == "987"
    assert len(tokenizer.encode("zqzqzq")) == 1 and len(tokenizer.encode(" quick")) == 1


# ----------------------------------------------------------------------------
# Begin-of-text


def test_begin_of_text_comes_once(family: str, model: Model) -> None:
    begin = model.tokenizer.control_id(BEGIN[family])
    assert (model.tokenizer.opening, model.tokenizer.closing) == ([begin], [])
    assert model.tokenizer.encode("a b") == model.tokenizer.encode("a b", special=True)
    for messages in CONVERSATIONS:  # the template prints it
        prompt = model.chat_prompt(messages)
        assert prompt[0] == begin and prompt.count(begin) == 1


def test_begin_of_text_is_put_only_where_the_files_say(tmp_path: Path, data: str, family: str) -> None:
    def opening(**tokenizer_config: Any) -> list[int]:
        with Directory(write_source(tmp_path / "source", family, data, **tokenizer_config)) as files:
            return Tokenizer(Checkpoint(files).tokenizer).opening

    begin = [tokenizers.Tokenizer.from_str(data).token_to_id(BEGIN[family])]
    own = begin if family == "llama3" else []
    assert opening() == opening(add_bos_token=False) == own
    assert opening(add_bos_token=True) == begin
    assert opening(add_bos_token=True, bos_token={"content": BEGIN[family]}) == begin
    for bos in (None, "<missing>"):
        with pytest.raises(SourceError, match=r"tokenizer_config.json: add_bos_token is true, but bos_token"):
            opening(add_bos_token=True, bos_token=bos)


# ----------------------------------------------------------------------------
# Templates


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("ends", [True, False])
def test_templates_render_as_in_transformers(
    family: str, data: str, messages: list[dict[str, str]], ends: bool
) -> None:
    transformers = pytest.importorskip("transformers")
    source = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(data), bos_token=BEGIN[family]
    )
    given = {"add_generation_prompt": ends, "date_string": "26 Jul 2024"}
    expected = source.apply_chat_template(messages, chat_template=TEMPLATES[family], tokenize=False, **given)
    variables = {"messages": messages, "bos_token": BEGIN[family], **given}
    assert Renderer().render(TEMPLATES[family], variables) == expected


def test_a_prompt_is_the_rendered_template(family: str, data: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    template = '{%- set date_string = "26 Jul 2024" %}' + TEMPLATES[family]
    export(write_source(tmp_path / "source", family, data, chat_template=template), tmp_path / "model.bin")
    model = Model(str(tmp_path / "model.bin"))
    source = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(data), bos_token=BEGIN[family]
    )
    for messages in CONVERSATIONS[:2]:
        text = source.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
        assert model.chat_prompt(messages) == source.encode(text, add_special_tokens=False)
