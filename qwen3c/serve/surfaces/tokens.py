"""POST /tokenize, /detokenize and /apply-template, GET /tokenizer_info: texts, conversations and token ids.

The fields are vLLM's and llama.cpp's: a text may be called prompt, content or text. lm-eval reads
/tokenizer_info.
"""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ...text.tokenizer import Tokenizer
from ..api import Api, json_answer
from ..errors import ApiError
from ..fields import Fields
from ..models import Served
from ..talk import Talk, ids_of
from .chat import messages_of, thinking_of, tools_of

IGNORED = ("user", "reasoning_effort")
TEXTS = ("prompt", "content", "text")


def routes(api: Api) -> list[Route]:
    """The endpoints."""

    async def tokenize(request: Request) -> Response:
        fields = await api.fields(request)
        served = await api.models.get(fields.text("model"))
        pieces, texts = fields.flag("with_pieces", False), fields.flag("return_token_strs", False)
        fields.ignore(*IGNORED)
        if "messages" in fields:
            talk = talk_of(fields, served)
            headers = api.headers(served, fields.finish())
            ids = await talk.prompt(served)
        else:
            name, text, special, opens = text_of(fields)
            headers = api.headers(served, fields.finish())
            ids = await served.work(encoded, served.model.tokenizer, name, text, special, opens)
        body = await served.work(tokens_body, served, ids, pieces, texts)
        return json_answer(body, headers=headers)

    async def detokenize(request: Request) -> Response:
        fields = await api.fields(request)
        served = await api.models.get(fields.text("model"))
        ids = ids_of(fields, "tokens", served.model.config.n_tokens)
        fields.ignore(*IGNORED)
        headers = api.headers(served, fields.finish())
        text = await served.work(served.model.tokenizer.decode, ids)
        return json_answer({"prompt": text, "content": text}, headers=headers)

    async def apply_template(request: Request) -> Response:
        fields = await api.fields(request)
        served = await api.models.get(fields.text("model"))
        talk = talk_of(fields, served)
        fields.ignore(*IGNORED)
        headers = api.headers(served, fields.finish())
        ids = await talk.prompt(served)
        return json_answer({"prompt": await served.work(served.model.tokenizer.decode, ids)}, headers=headers)

    async def tokenizer_info(request: Request) -> Response:
        served = await api.models.get(request.query_params.get("model"))
        return json_answer(await served.work(info_body, served), headers=api.headers(served, []))

    return [
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
        Route("/apply-template", apply_template, methods=["POST"]),
        Route("/tokenizer_info", tokenizer_info, methods=["GET"]),
    ]


def talk_of(fields: Fields, served: Served) -> Talk:
    """The conversation of a request, whose tokens or text are wanted."""
    thinking, _ = thinking_of(fields, served)
    fields.refuse("add_generation_prompt", "a conversation ends where the assistant speaks", unless=(True,))
    fields.ignore("add_special", "add_special_tokens")  # a template says itself how a text begins
    fields.refuse("continue_final_message", "a reply always begins a new message", unless=(False,))
    fields.refuse("chat_template", "the model's own template is used")
    return Talk(messages_of(fields, "messages"), tools=tools_of(fields), thinking=thinking)


def text_of(fields: Fields) -> tuple[str, str, bool, bool]:
    """(the name of the field with the text, the text, whether control tokens in it are such, whether it
    opens).

    A `prompt` opens with what the vocabulary puts before a text, as in vLLM; a `content` does not, as in
    llama.cpp.
    """
    given = [name for name in TEXTS if name in fields]
    if not given:
        raise fields.error("prompt", "is missing; content, text or messages will do as well")
    if len(given) > 1:
        raise fields.error(given[1], f"is there beside {given[0]}: give one of them")
    special = fields.flag("parse_special", True) is not False
    opens = fields.flag("add_special", given[0] == "prompt")
    opens = fields.flag("add_special_tokens", opens)
    return given[0], fields.text(given[0]) or "", special, opens or False


def encoded(tokenizer: Tokenizer, name: str, text: str, special: bool, opens: bool) -> list[int]:
    """Token ids of a text. special: whether the text of a control token is that token."""
    try:
        return [*(tokenizer.opening if opens else ()), *tokenizer.encode(text, special=special)]
    except ValueError as error:
        raise ApiError(400, f"{name}: {error}", param=name) from None


def tokens_body(served: Served, ids: list[int], pieces: bool, texts: bool) -> dict[str, Any]:
    """The ids; pieces: each beside its text. texts: the texts in a list of their own."""
    tokenizer = served.model.tokenizer
    tokens: list[Any] = (
        [{"id": id, "piece": piece(tokenizer.token_bytes(id))} for id in ids] if pieces else ids
    )
    body = {"tokens": tokens, "count": len(ids), "max_model_len": served.context}
    if texts:
        body["token_strs"] = [tokenizer.token_bytes(id).decode("utf-8", "replace") for id in ids]
    return body


def piece(raw: bytes) -> str | list[int]:
    """The text of a token; its bytes, as llama.cpp gives them, where they are no whole characters."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return list(raw)


def info_body(served: Served) -> dict[str, Any]:
    """The tokenizer in the words of a tokenizer_config.json."""
    model = served.model
    named = model.metadata.get("special_tokens", {})
    end = model.tokenizer.decode(model.metadata["eos_token_ids"][:1]) or None
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": named.get("bos_token"),
        "eos_token": named.get("eos_token", end),
        "pad_token": named.get("pad_token"),
        "chat_template": model.chat_template.source or None,
        "model_max_length": served.context,
        "vocab_size": model.config.n_tokens,
    }
