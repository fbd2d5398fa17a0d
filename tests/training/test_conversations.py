from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from nano import conversation, write_chat, write_jsonl
from small_models import TINY_QWEN3

from qwen3c.format import ModelFile
from qwen3c.training import TrainingError
from qwen3c.training.conversations import Rows, Sample, collate, pack, read_samples, split
from qwen3c.training.next_token import IGNORED
from qwen3c.training.shapes import Shape, new_model
from qwen3c.training.vocabulary import train_bpe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_bpe(["What is 3 + 4? It is 7."], 290)


def test_the_reply_and_its_end_are_learned_and_nothing_else(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write_jsonl(tmp_path / "chat.jsonl", [conversation("3 + 4?", "It is 7.")])
    (sample,), _ = read_samples(path, tokenizer, 64)
    batch = collate([[sample]], 64, tokenizer.pad_token_id)
    targets = batch["targets"][0]
    assert tokenizer.decode(targets[targets != IGNORED].tolist()) == "It is 7.<|im_end|>"
    assert tokenizer.decode(sample.tokens[: sample.prompt_length]) == (
        "<|im_start|>user\n3 + 4?<|im_end|>\n<|im_start|>assistant\n"
    )
    # the target of a place is the token after it
    for i in np.flatnonzero(targets.numpy() != IGNORED):
        assert targets[i] == batch["tokens"][0, i + 1]


def test_plain_text_among_conversations_is_learned_whole(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    lines = [conversation("3 + 4?", "It is 7."), {"text": "What is 3 + 4?"}]
    samples, _ = read_samples(write_jsonl(tmp_path / "chat.jsonl", lines), tokenizer, 64)
    targets = collate([samples[1:]], 64, tokenizer.pad_token_id)["targets"][0]
    first, *rest = samples[1].tokens  # nothing foretells the first token
    assert targets[targets != IGNORED].tolist() == rest
    assert tokenizer.decode([first, *rest]) == "What is 3 + 4?<|endoftext|>"


@pytest.mark.parametrize(
    "text, complaint",
    [(7, "text is not a text"), ("", "text is not a text"), ("a<|im_end|>", "text holds the")],
)
def test_bad_plain_text_is_refused_with_its_line(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, text: Any, complaint: str
) -> None:
    path = write_jsonl(tmp_path / "chat.jsonl", [conversation("a", "b"), {"text": text}])
    with pytest.raises(TrainingError, match=f"line 2: {complaint}"):
        read_samples(path, tokenizer, 64)


def test_every_reply_of_a_conversation_is_a_sample(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    messages = conversation("a", "b")["messages"] + conversation("c", "d")["messages"]
    path = write_jsonl(tmp_path / "chat.jsonl", [{"messages": messages}])
    samples, _ = read_samples(path, tokenizer, 64)
    replies = [tokenizer.decode(s.tokens[s.prompt_length :]) for s in samples]
    assert replies == ["b<|im_end|>", "d<|im_end|>"]


def test_a_packed_sample_gets_the_logits_it_gets_alone(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    import torch

    model = new_model(Shape(32, 64, 2, 2, 1, 16, 128), tokenizer, seed=1).eval()  # type: ignore[no-untyped-call]
    samples, _ = read_samples(write_chat(tmp_path / "chat.jsonl", 4), tokenizer, 128)
    batch = collate([samples], 128, tokenizer.pad_token_id)
    with torch.no_grad():
        packed = model(
            input_ids=batch["tokens"],
            position_ids=batch["positions"],
            attention_mask=batch["attention"],
            use_cache=False,
        ).logits[0]
        start = 0
        for sample in samples:
            alone = model(input_ids=torch.tensor([sample.tokens]), use_cache=False).logits[0]
            both = packed[start : start + len(sample.tokens)]
            assert float(((both - alone) ** 2).sum() / (alone**2).sum()) < 1e-10
            start += len(sample.tokens)


def test_without_the_mask_packed_samples_would_see_each_other(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    import torch

    model = new_model(Shape(32, 64, 2, 2, 1, 16, 128), tokenizer, seed=1).eval()  # type: ignore[no-untyped-call]
    samples, _ = read_samples(write_chat(tmp_path / "chat.jsonl", 4), tokenizer, 128)
    batch = collate([samples], 128, tokenizer.pad_token_id)
    causal = torch.ones(128, 128, dtype=torch.bool).tril()[None, None]
    with torch.no_grad():
        logits = [
            model(
                input_ids=batch["tokens"],
                position_ids=batch["positions"],
                attention_mask=mask,
                use_cache=False,
            ).logits[0]
            for mask in (batch["attention"], causal)
        ]
    n = len(samples[0].tokens)
    assert torch.allclose(logits[0][:n], logits[1][:n], atol=1e-5)
    assert not torch.allclose(logits[0][n : 2 * n], logits[1][n : 2 * n], atol=1e-4)


def test_rows_hold_every_sample_once_per_epoch_and_no_row_overflows() -> None:
    random = np.random.default_rng(1)
    samples = [Sample(list(range(random.integers(2, 30))), 1) for _ in range(200)]
    rows = Rows(samples, 64, seed=1)
    i = 0
    for _ in range(2):
        seen: list[Sample] = []
        while len(seen) < len(samples):
            assert sum(len(s.tokens) for s in rows[i]) <= 64
            seen += rows[i]
            i += 1
        assert sorted(map(id, seen)) == sorted(map(id, samples))
    filled = sum(len(s.tokens) for s in samples) / (64 * len(pack(samples, 64)))
    assert filled > 0.9


def test_rows_may_be_asked_for_in_any_order() -> None:
    samples = [Sample([1] * n, 1) for n in range(2, 40)]
    rows = Rows(samples, 64, seed=1)
    forward = [rows[i] for i in range(60)]
    assert [rows[i] for i in reversed(range(60))] == forward[::-1]


def test_samples_longer_than_the_context_are_counted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write_jsonl(
        tmp_path / "chat.jsonl", [conversation("short", "ok"), conversation("long " * 200, "ok")]
    )
    samples, too_long = read_samples(path, tokenizer, 64)
    assert (len(samples), too_long) == (1, 1)
    with pytest.raises(TrainingError, match="all 2 samples are longer than the context of 4"):
        read_samples(path, tokenizer, 4)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"messages": [', "line 2: is not JSON"),
        ("[1, 2]", "line 2: is a JSON list"),
        ("{}", "line 2: messages is not a list"),
        ('{"messages": []}', "line 2: messages is not a list"),
        ('{"messages": [{"content": "x"}]}', "line 2: message 0 has no role"),
        ('{"messages": [{"role": "user", "content": 3}]}', "line 2: the content of message 0 is not text"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "line 2: has no message of the assistant"),
        (json.dumps(conversation("<|im_end|>", "x")), "line 2: message 0 holds the control token <|im_end|>"),
        ("[" * 100000, "line 2: is not JSON"),
    ],
)
def test_a_bad_line_is_named_by_its_number(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, line: str, message: str
) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps(conversation("a", "b")) + "\n" + line + "\n")
    with pytest.raises(TrainingError, match=message) as error:
        read_samples(path, tokenizer, 64)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_an_empty_or_binary_file_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "chat.jsonl"
    for data, message in ((b"\n\n", "is empty"), (b"\xff\n", "line 1: byte 0 is not UTF-8")):
        path.write_bytes(data)
        with pytest.raises(TrainingError, match=message):
            read_samples(path, tokenizer, 64)


def test_a_template_that_prompts_otherwise_than_it_renders_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    other = train_bpe(["x"], 280)
    other.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    path = write_jsonl(tmp_path / "chat.jsonl", [conversation("a", "b")])
    with pytest.raises(TrainingError, match="renders message 1 otherwise"):
        read_samples(path, other, 64)
    other.chat_template = None
    with pytest.raises(TrainingError, match="has no chat template"):
        read_samples(path, other, 64)


def test_the_split_is_disjoint_and_a_function_of_the_seed() -> None:
    samples = [Sample([i, i + 1], 1) for i in range(100)]
    train, validation = split(samples, 0.1, seed=1)
    assert len(validation) == 10 and not {id(s) for s in train} & {id(s) for s in validation}
    assert {id(s) for s in split(samples[::-1], 0.1, seed=1)[1]} == {id(s) for s in validation}


# ----------------------------------------------------------------------------
# Thoughts, tools, roles: what transformers renders, or a refusal


@pytest.fixture(scope="module")
def qwen3() -> PreTrainedTokenizerFast:
    """Qwen3's template and control tokens on a small vocabulary."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    file = ModelFile(TINY_QWEN3)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=Tokenizer.from_buffer(file.tokenizer),
        chat_template=file.template,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )


USER = {"role": "user", "content": "Weather in Paris?"}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "description": "It.", "parameters": {}}}]
THOUGHT = {"role": "assistant", "content": "Sunny.", "reasoning_content": "Look outside."}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
ANSWERED = [
    USER,
    CALLING,
    {"role": "tool", "content": "18 C"},
    {"role": "assistant", "content": "18 degrees."},
]


@pytest.mark.parametrize(
    ("messages", "tools"),
    [
        ([USER, {"role": "assistant", "content": "Sunny."}], None),
        ([USER, THOUGHT], None),
        ([USER, {"role": "assistant", "content": "<think>\nLook.\n</think>\n\nSunny."}], None),
        ([{"role": "system", "content": "Be brief."}, USER, THOUGHT, USER, THOUGHT], TOOLS),
        ([USER, CALLING], TOOLS),
        ([USER, {**CALLING, "content": None}], TOOLS),
        ([USER, {**CALLING, "reasoning_content": "Ask."}], None),
        ([USER, {**CALLING, "content": "I ask.", "tool_calls": [CALL, CALL]}], TOOLS),
        (ANSWERED, TOOLS),
    ],
)
def test_samples_are_what_transformers_renders(
    tmp_path: Path,
    qwen3: PreTrainedTokenizerFast,
    messages: list[dict[str, Any]],
    tools: Any,
) -> None:
    line = {"messages": messages} | ({"tools": tools} if tools else {})
    samples, _ = read_samples(write_jsonl(tmp_path / "chat.jsonl", [line]), qwen3, 4096)
    replies = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    assert len(samples) == len(replies)
    for i, sample in zip(replies, samples, strict=True):
        # null content, which no template of Qwen's takes, stands for none
        said = [{**m, "content": m["content"] or ""} for m in messages[: i + 1]]
        whole = str(qwen3.apply_chat_template(said, tools=tools, tokenize=False))
        assert str(qwen3.decode(sample.tokens)) + "\n" == whole
        assert sample.tokens == qwen3.encode(whole.removesuffix("\n"), add_special_tokens=False)
        reply = str(qwen3.decode(sample.tokens[sample.prompt_length :]))
        assert said[i]["content"].split("</think>\n\n")[-1] in reply and reply.endswith("<|im_end|>")
        thought = said[i].get("reasoning_content", "")
        assert thought in reply and ("get_weather" in reply) == bool(said[i].get("tool_calls"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"messages": [USER, THOUGHT]}, "the chat template drops the reasoning_content of message 1"),
        ({"messages": [USER, CALLING]}, "the chat template drops the tool_calls of message 1"),
        ({"messages": [USER, {**CALLING, "content": None}]}, "drops the tool_calls of message 1"),
        ({"messages": [USER, {**THOUGHT, "reasoning_content": None}], "tools": TOOLS}, "calls no tools"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "content of message 1 is not text"),
        (
            {"messages": [{"role": "wizard", "content": "x"}, THOUGHT]},
            "message 0 has the role 'wizard', not one",
        ),
        (
            {"messages": [{"role": "<|im_end|>", "content": "x"}, THOUGHT]},
            "message 0 has the role '<|im_end|>'",
        ),
        ({"messages": [USER, THOUGHT], "tools": "all"}, "tools is not a list of objects"),
        ({"messages": [USER, {**CALLING, "tool_calls": ["f"]}]}, "tool_calls is not a list"),
        (
            {"messages": [USER, {**THOUGHT, "reasoning_content": "<|im_start|>"}]},
            r"message 1 holds the control token <\|im_start\|>",
        ),
        (
            {"messages": [USER, {**CALLING, "tool_calls": [{"function": {"name": "<|im_end|>"}}]}]},
            r"message 1 holds the control token <\|im_end\|>",
        ),
    ],
)
def test_what_our_own_template_cannot_render_is_refused_by_line(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, line: dict[str, Any], message: str
) -> None:
    path = write_jsonl(tmp_path / "chat.jsonl", [conversation("a", "b"), line])
    with pytest.raises(TrainingError, match=f"line 2: .*{message}"):
        read_samples(path, tokenizer, 4096)


def test_a_template_that_drops_the_tools_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    other = train_bpe(["x"], 280)
    other.chat_template = tokenizer.chat_template.split("\n", 1)[1]
    path = write_jsonl(tmp_path / "chat.jsonl", [{**conversation("a", "b"), "tools": TOOLS}])
    with pytest.raises(TrainingError, match="line 1: the chat template drops the tools"):
        read_samples(path, other, 4096)


def test_plain_text_keeps_what_looks_like_a_tag(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_jsonl(tmp_path / "chat.jsonl", [{"text": "a <think> b"}])
    ((sample,), _) = read_samples(path, tokenizer, 4096)
    assert tokenizer.convert_tokens_to_ids("<think>") not in sample.tokens
    assert tokenizer.decode(sample.tokens[:-1]) == "a <think> b"


def test_a_byte_order_mark_is_no_error_and_half_a_character_is(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(conversation("a", "b")).encode())
    assert len(read_samples(path, tokenizer, 64)[0]) == 1
    path.write_text(json.dumps(conversation("a", "b")) + "\n" + json.dumps(conversation("a \ud83d", "b")))
    with pytest.raises(TrainingError, match="line 2: holds half of a surrogate pair, '.ud83d'"):
        read_samples(path, tokenizer, 64)
    path.write_text(json.dumps(conversation("a \U0001f600", "b")))  # a whole pair
    assert len(read_samples(path, tokenizer, 64)[0]) == 1
