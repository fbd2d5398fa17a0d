"""What the document of the API says beside what the code does: summaries, descriptions, shapes of answers.

openapi.py sees in the code which fields there are. A field that has no description here, and a description
that no field has, fail tests/serve/test_openapi.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .errors import VERSION
from .examples import (
    BLOCKS,
    CHATS,
    EMBEDDINGS,
    MESSAGES,
    RERANKS,
    RESPONSES,
    TEMPLATES,
    TEXTS,
    TOKENIZES,
    Json,
)


@dataclass(frozen=True)
class Endpoint:
    """What is known of an endpoint. answer: the shape of its body, or the type of one that is no JSON.

    events: the shape of an event's data, where the answer may come as a stream. examples: bodies that are
    accepted. query: its parameters. headers: name -> what for, its values. errors: what it answers when it
    cannot. open: it needs no key.
    """

    summary: str
    answer: str
    examples: tuple[Json, ...] = ()
    events: str | None = None
    query: tuple[str, ...] = ()
    headers: Mapping[str, tuple[str, tuple[str, ...]]] = field(default_factory=dict)
    errors: tuple[int, ...] = (401, 403, 404, 500)
    open: bool = False


READING = (400, 401, 403, 404, 408, 413, 415, 500, 503)  # what can go wrong with any body
ENGINE = (*READING, 429)  # and with one that the engine works at

ERRORS = {
    400: "a field is wrong, missing or not supported: `param` names it",
    401: "no key, or a wrong one",
    403: "the Host or the Origin is not one of this server's",
    404: "there is nothing at this address, or no model of this name",
    408: "the header or the body did not come in time",
    409: "the tool is another one than was agreed to",
    413: "the body is too large",
    415: "the body is not application/json in UTF-8",
    429: "the queue is full, or the key has enough under way: `retry-after` says when to come again",
    500: "the server failed; the same request would fail again",
    503: "the model cannot be loaded, or the server is stopping",
}

VERSIONED = {VERSION: ("with it the answer is in Anthropic's words", ("2023-06-01",))}

ENDPOINTS: dict[tuple[str, str], Endpoint] = {
    ("POST", "/v1/chat/completions"): Endpoint(
        "A reply to a conversation",
        "ChatCompletion",
        CHATS,
        events="ChatCompletionChunk",
        headers={"x-qwen3c-route": ("who answers, if a provider is asked first", ("auto", "local", "cloud"))},
        errors=ENGINE,
    ),
    ("POST", "/v1/completions"): Endpoint(
        "How a text goes on",
        "Completion",
        TEXTS,
        events="CompletionChunk",
        errors=ENGINE,
    ),
    ("POST", "/v1/responses"): Endpoint(
        "A reply, in the words of OpenAI's newer API; nothing is stored",
        "Response",
        RESPONSES,
        events="ResponseEvent",
        errors=ENGINE,
    ),
    ("POST", "/v1/responses/input_tokens"): Endpoint(
        "How many tokens a request to /v1/responses is",
        "InputTokens",
        tuple(body for body in RESPONSES if "stream" not in body),
        errors=READING,
    ),
    ("POST", "/v1/messages"): Endpoint(
        "A reply, in the words of Anthropic's API",
        "Message",
        MESSAGES,
        events="MessageEvent",
        errors=ENGINE,
    ),
    ("POST", "/v1/messages/count_tokens"): Endpoint(
        "How many tokens a conversation is",
        "InputTokens",
        BLOCKS,
        errors=READING,
    ),
    ("POST", "/v1/embeddings"): Endpoint(
        "Texts as vectors of length 1",
        "Embeddings",
        EMBEDDINGS,
        errors=ENGINE,
    ),
    **{
        ("POST", path): Endpoint(
            "How well documents meet a query: the best first",
            "Reranked",
            RERANKS,
            errors=ENGINE,
        )
        for path in ("/v1/rerank", "/rerank")
    },
    ("POST", "/tokenize"): Endpoint(
        "A text or a conversation as token ids",
        "Tokens",
        TOKENIZES,
        errors=READING,
    ),
    ("POST", "/detokenize"): Endpoint(
        "Token ids as a text", "Text", ({"tokens": [5, 6, 7]},), errors=READING
    ),
    ("POST", "/apply-template"): Endpoint(
        "A conversation as the text that the model reads",
        "Prompt",
        TEMPLATES,
        errors=READING,
    ),
    ("GET", "/tokenizer_info"): Endpoint(
        "The tokenizer, in the words of tokenizer_config.json", "TokenizerInfo", query=("model",)
    ),
    ("GET", "/v1/models"): Endpoint("The models", "ModelList", headers=VERSIONED),
    ("GET", "/v1/models/{name}"): Endpoint("One model", "Model", headers=VERSIONED),
    ("GET", "/props"): Endpoint("What is served and how, as llama-server says it", "Props", query=("model",)),
    ("GET", "/health"): Endpoint(
        "Whether the server does its work; 503 if not", "Health", errors=(403, 503), open=True
    ),
    ("GET", "/version"): Endpoint("The version", "Version"),
    ("GET", "/metrics"): Endpoint("Counters and histograms for Prometheus", "text/plain", errors=(401, 403)),
    ("GET", "/openapi.json"): Endpoint("This document", "OpenApi"),
    ("GET", "/"): Endpoint("The page", "text/html", errors=(403,), open=True),
    ("GET", "/page/tools"): Endpoint(
        "For the page: tools of the MCP servers that are configured", "PageTools"
    ),
    ("POST", "/page/tools/call"): Endpoint(
        "For the page: one call of such a tool",
        "PageResult",
        errors=(400, 401, 403, 404, 409, 413, 415, 500),
    ),
    ("POST", "/mcp"): Endpoint(
        "The MCP server, streamable HTTP", "application/json", errors=(400, 401, 403, 413, 415)
    ),
}

# Field, by any end of its dotted path -> what it says. The longest end is taken, one with its endpoint first
DESCRIPTIONS = {
    "/v1/responses text": "what the reply must look like, in `format`",
    "/v1/responses/input_tokens text": "what the reply must look like, in `format`",
    "/v1/embeddings input": "a text, texts, token ids, or lists of those",
    "/v1/completions logprobs": "so many of the most likely tokens beside each token",
    "/v1/completions max_tokens": "the longest reply; 16 without it",
    "/tokenize prompt": "a text; it begins with the vocabulary's opening token, if there is one",
    "/tokenize content": "a text as it is",
    "/tokenize text": "a text as it is",
    "model": "an alias of /v1/models; with one model any name means it",
    "messages": "the conversation; system messages join into the first",
    "messages[].role": "system, developer, user, assistant or tool",
    "messages[].content": "a text, or parts of text",
    "messages[].reasoning_content": (
        "what the assistant thought; `reasoning` and `thinking` are other names of it"
    ),
    "messages[].reasoning": "see reasoning_content",
    "messages[].thinking": "see reasoning_content",
    "messages[].name": "of who speaks, or of the tool, if the template shows it",
    "messages[].refusal": "the content, where that is missing",
    "messages[].tool_calls": "calls that the assistant made",
    "messages[].tool_call_id": "of the call that this is the result of",
    "tools": "functions that the reply may call; tools of other kinds are left out",
    "tool_choice": "auto, required, none, or one function",
    "tool_choice.name": "of the one function",
    "parallel_tool_calls": "whether a reply may hold several calls",
    "max_tokens": "the longest reply; without it, what the context holds",
    "max_completion_tokens": "newer name of max_tokens",
    "max_output_tokens": "the longest reply, thinking included",
    "temperature": "0: always the most likely token",
    "top_p": "tokens of this probability together are considered",
    "top_k": "so many of the most likely tokens are considered; 0: all",
    "min_p": "tokens at least so likely, compared to the most likely one",
    "presence_penalty": "taken from the logit of every token that was there",
    "frequency_penalty": "the same, times how often it was there",
    "repetition_penalty": "divides the logit of every token that was there",
    "repeat_penalty": "llama.cpp's name of repetition_penalty",
    "logit_bias": "token id -> what is added to its logit",
    "seed": "the same seed gives the same text, whatever else runs",
    "stop": "texts that end the reply and are not in it",
    "stop_sequences": "texts that end the reply and are not in it",
    "n": "how many replies; reply i has seed + i",
    "logprobs": "log-probabilities of the reply's tokens",
    "top_logprobs": "so many of the most likely tokens beside each",
    "stream": "the answer as server-sent events",
    "stream_options": "of a stream",
    "include_usage": "tokens in a last event of their own",
    "return_progress": "events with `prompt_progress` while the request waits and its prompt is read",
    "priority": "lower comes sooner; no sooner than the key allows",
    "thinking_budget": "tokens of thought at most; then the thinking ends and the answer begins",
    "reasoning_effort": "a wish: none and minimal do not think, if the model can choose",
    "reasoning": "how much to think",
    "reasoning.effort": "a wish: none and minimal do not think, if the model can choose",
    "continue_final_message": "the reply goes on with the last message, which is the assistant's",
    "add_generation_prompt": "false where continue_final_message is true",
    "chat_template_kwargs": "of the template's switches enable_thinking alone",
    "enable_thinking": "whether to think: an order, refused by a model that cannot obey",
    "response_format": "what the reply must look like",
    "response_format.type": "lark, regex and choice go beyond OpenAI",
    "json_schema": "llama.cpp's name of a schema that the reply must follow",
    "response_format.json_schema": "name, schema, strict",
    "schema": "a JSON schema",
    "strict": (
        "a schema that cannot be enforced to the letter is a 400; without it what cannot be is "
        "dropped and named in `x-qwen3c-dropped`"
    ),
    "response_format.regex": "a regular expression for the whole reply",
    "response_format.choice": "the reply is one of these texts",
    "response_format.lark": "a grammar in llguidance's Lark",
    "guided_json": "vLLM's name of a schema that the reply must follow",
    "guided_regex": "vLLM's name of a regex",
    "guided_choice": "vLLM's name of a choice",
    "modalities": '["text"] alone',
    "prompt": "a text, texts, token ids, or lists of those: what is gone on from",
    "echo": "the prompt stands before the reply; with logprobs its tokens have theirs",
    "return_token_ids": "token ids of prompt and reply",
    "return_tokens_as_token_ids": "tokens in logprobs are called token_id:N",
    "parse_special": "whether the text of a control token is that token",
    "add_special_tokens": "whether the vocabulary's opening token is put before a text",
    "add_special": "llama.cpp's name of add_special_tokens",
    "input": "a text, or items: messages, reasoning, function_call, function_call_output",
    "content[].input": "the arguments",
    "content[].thinking": "what was thought",
    "content[].name": "of the tool",
    "instructions": "a system message before all others",
    "include": "message.output_text.logprobs; nothing comes of the others that OpenAI has",
    "text": "a text",
    "text.format": "what the reply must look like",
    "system": "a text, or blocks of text",
    "output_config": "what the reply must look like",
    "output_config.format": "a schema, which the reply follows to the letter",
    "output_format": "the older name of output_config.format",
    "thinking": "whether to think: enabled, adaptive or disabled",
    "budget_tokens": "tokens of thought at most",
    "disable_parallel_tool_use": "at most one call a reply",
    "encoding_format": "float, or base64 of little-endian float32",
    "dimensions": "the first so many numbers, at length 1 again: for models trained for it",
    "query": "what is looked for",
    "documents": "texts; the answer is an object, as Jina and Cohere have it",
    "texts": "texts; the answer is a list, as text-embeddings-inference has it",
    "top_n": "so many results",
    "return_documents": "the texts, too",
    "return_text": "the texts, too",
    "raw_scores": "logits in place of probabilities",
    "instruction": "what the search is for; without it the recipe's own",
    "content": "a text",
    "tokens": "token ids",
    "with_pieces": "each id beside its text",
    "return_token_strs": "the texts in a list of their own",
    "type": "which kind",
    "role": "who speaks",
    "name": "a name",
    "description": "what it is for",
    "arguments": "JSON, as a text or an object",
    "function": "name and arguments",
    "id": "of the call",
    "call_id": "of the call",
    "tool_use_id": "of the call",
    "refusal": "a text",
    "output": "the result, a text or parts of text",
    "summary": "thoughts, in short",
    "is_error": "the tool failed; the model reads that",
    "parameters": "a JSON schema",
    "input_schema": "a JSON schema",
}


# ----------------------------------------------------------------------------
# Answers


def shape(fields: str) -> Json:
    """The schema of an object: "id:string created:integer note?:string|null choices:[Choice] usage:Usage".

    A name with ? may be missing. A type is JSON's, `any`, a shape of ANSWERS, or a list of one in brackets.
    """
    properties, required = {}, []
    for one in fields.split():
        name, _, kinds = one.partition(":")
        if not name.endswith("?"):
            required.append(name)
        found = [_type(kind) for kind in kinds.split("|")]
        properties[name.rstrip("?")] = found[0] if len(found) == 1 else {"anyOf": found}
    return {"type": "object", "properties": properties, "required": required}


def _type(kind: str) -> Json:
    if kind.startswith("["):
        return {"type": "array", "items": _type(kind[1:-1])}
    if kind == "any":
        return {}
    return {"$ref": f"#/components/schemas/{kind}"} if kind[0].isupper() else {"type": kind}


ANSWERS: dict[str, Json] = {
    "Error": shape("error:ErrorBody"),
    "ErrorBody": shape("message:string type:string param:string|null code:string|null"),
    "AnthropicError": shape("type:string error:AnthropicErrorBody"),
    "AnthropicErrorBody": shape("type:string message:string"),
    "Usage": shape(
        "prompt_tokens:integer total_tokens:integer completion_tokens?:integer "
        "prompt_tokens_details:object completion_tokens_details?:object"
    ),
    "Timings": shape(
        "cache_n:integer prompt_n:integer prompt_ms:number prompt_per_second:number "
        "predicted_n:integer predicted_ms:number "
        "predicted_per_second:number draft_n:integer draft_n_accepted:integer"
    ),
    "Progress": shape(
        "total:integer cache:integer processed:integer time_ms:number stage:string position:integer"
    ),
    "ChatCompletion": shape(
        "id:string object:string created:integer model:string choices:[ChatChoice] usage:Usage "
        "timings:Timings system_fingerprint:string"
    ),
    "ChatChoice": shape("index:integer message:ChatMessage logprobs:object|null finish_reason:string"),
    "ChatMessage": shape(
        "role:string content:string|null refusal:null reasoning_content?:string tool_calls?:[ToolCall]"
    ),
    "ToolCall": shape("id:string type:string function:object"),
    "ChatCompletionChunk": shape(
        "id:string object:string created:integer model:string choices:[ChatDelta] "
        "usage?:Usage|null timings?:Timings "
        "prompt_progress?:Progress system_fingerprint:string"
    ),
    "ChatDelta": shape("index:integer delta:object logprobs:object|null finish_reason:string|null"),
    "Completion": shape(
        "id:string object:string created:integer model:string choices:[CompletionChoice] "
        "usage:Usage timings:Timings "
        "system_fingerprint:string"
    ),
    "CompletionChunk": shape(
        "id:string object:string created:integer model:string choices:[CompletionChoice] "
        "usage?:Usage|null timings?:Timings "
        "prompt_progress?:Progress system_fingerprint:string"
    ),
    "CompletionChoice": shape(
        "index:integer text:string logprobs:object|null finish_reason:string|null "
        "token_ids?:[integer] prompt_token_ids?:[integer]"
    ),
    "Response": shape(
        "id:string object:string created_at:integer status:string model:string output:[object] "
        "usage:object|null error:null"
    ),
    "ResponseEvent": shape("type:string sequence_number:integer"),
    "Message": shape(
        "id:string type:string role:string model:string content:[object] stop_reason:string "
        "stop_sequence:string|null usage:object"
    ),
    "MessageEvent": shape("type:string"),
    "InputTokens": shape("object?:string input_tokens:integer"),
    "Embeddings": shape("object:string data:[Embedding] model:string usage:Usage"),
    "Embedding": shape("object:string index:integer embedding:[number]|string"),
    "Reranked": {
        "anyOf": [
            shape("id:string object:string model:string results:[Ranked] usage:Usage"),
            _type("[Scored]"),
        ]
    },
    "Ranked": shape("index:integer relevance_score:number document?:object"),
    "Scored": shape("index:integer score:number text?:string"),
    "Tokens": shape("tokens:[any] count:integer max_model_len:integer token_strs?:[string]"),
    "Text": shape("prompt:string content:string"),
    "Prompt": shape("prompt:string"),
    "TokenizerInfo": shape(
        "tokenizer_class:string bos_token:any eos_token:any chat_template:string|null "
        "model_max_length:integer vocab_size:integer"
    ),
    "ModelList": {
        "anyOf": [
            shape("object:string data:[ModelCard]"),
            shape("data:[AnthropicModel] first_id:string last_id:string has_more:boolean"),
        ]
    },
    "Model": {"anyOf": [_type("ModelCard"), _type("AnthropicModel")]},
    "AnthropicModel": shape(
        "type:string id:string display_name:string created_at:string lifecycle:string "
        "max_input_tokens:integer|null max_tokens:integer|null capabilities:null"
    ),
    "ModelCard": shape(
        "id:string object:string created:integer owned_by:string context_length:integer|null "
        "max_model_len:integer|null "
        "capabilities:[string]|null loaded:boolean"
    ),
    "Props": shape(
        "model_alias:string model_path:null n_ctx:integer default_generation_settings:object "
        "total_slots:integer modalities:object "
        "chat_template:string thinking:string bos_token:any eos_token:any build_info:string "
        "upstream:object|null mcp:boolean needs_key:boolean"
    ),
    "Health": shape("status:string models:object queue:object"),
    "Version": shape("version:string"),
    "OpenApi": shape("openapi:string info:object paths:object"),
    "PageTools": shape("servers:[object] tools:[object]"),
    "PageResult": shape("content:string isError:boolean truncated:boolean"),
}

HEADERS = {
    "x-request-id": "of the request: the client's, or one made here",
    "x-qwen3c-backend": "who spoke: local or cloud",
    "x-qwen3c-model": "the alias of the model that answered",
    "x-qwen3c-fallback": "why the cloud, which was to answer, did not",
    "x-qwen3c-ignored": "fields of the request that nobody knows",
    "x-qwen3c-dropped": "keywords of a schema that could not be enforced and were not strict",
}
