"""A model that talks at random, for clients that want a long context, tools and a reply that ends.

Its weights are random but for two channels. One holds the same number at every position: through it the last
matrix gives each token the frequency that it has here, whatever came before. The other is there after line
ends, where a reply begins and so must not end. A reply is a few letters, thought and tool calls come only
where a grammar asks for them, and 40,000 tokens of prompt take seconds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import numpy as np
from small_models import (
    encode_tensor as encoded,
    small_weights,
    tokenizer_json,
    write_json,
    write_safetensors,
    write_small_model,
)
from tokenizers import Tokenizer

from qwen3c.convert.export import export

CONTEXT = 131072
LENGTH = 12  # tokens of a reply, on average
SAID = "abcdefghijklmnopqrstuvwxyz 0123456789,:"
MARKS = '"{}[]'  # which grammars want, as likely as the end of the reply: else space follows space
# Qwen3's, in so far as clients need it: tools, calls, their results, thought
TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- 'Call functions within <tool_call></tool_call> tags. They are:\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- elif message.role != 'system' or not loop.first %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if message.reasoning_content %}
            {{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- message.content }}
        {%- for call in message.tool_calls or () %}
            {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""


def write_talker(target: Path, tokenizer: Path | None = None, context: int = CONTEXT) -> Path:
    """Write `target`, a model.bin. tokenizer: a directory with Qwen3's
    tokenizer.json and tokenizer_config.json.
    """
    source = target.with_suffix(".source")
    text = tokenizer_json() if tokenizer is None else (tokenizer / "tokenizer.json").read_text()
    n_tokens = Tokenizer.from_str(text).get_vocab_size()
    shape = {
        "vocab_size": -(-n_tokens // 64) * 64, "context": context, "tied": False, "dim": 128, "hidden_dim": 128, "std": 0.02,
    }  # fmt: skip
    write_small_model(source, **shape)
    if tokenizer is None:
        config = {"eos_token": "<|im_end|>", "bos_token": None, "chat_template": TEMPLATE}
        write_json(source / "tokenizer_config.json", config)
    else:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(tokenizer / name, source / name)
        _use_ids(source, text)
    weights = small_weights(**shape)
    vocabulary = Tokenizer.from_str(text)
    lines = [id for word, id in vocabulary.get_vocab().items() if word.strip("Ċ") == ""]
    end = vocabulary.token_to_id("<|im_end|>")
    weights["model.embed_tokens.weight"][:, :2] = (1.0, 0.0)
    weights["model.embed_tokens.weight"][lines, 1] = 1.0
    weights["model.norm.weight"][:] = 1.0
    for name, matrix in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            matrix[:2] = 0  # no layer adds to the channels
    weights["lm_head.weight"][:, 0] = _biases(vocabulary, int(shape["vocab_size"]))
    weights["lm_head.weight"][:, 1] = 0
    weights["lm_head.weight"][end, 1] = -4
    write_safetensors(source / "model.safetensors", {name: encoded(w, "BF16") for name, w in weights.items()})
    export(source, target)
    shutil.rmtree(source)
    return target


def _use_ids(source: Path, text: str) -> None:
    """Let the configuration name the ids that the tokenizer has."""
    ids = {token["content"]: token["id"] for token in json.loads(text)["added_tokens"]}
    end, begin = ids["<|im_end|>"], ids["<|endoftext|>"]
    for name in ("config.json", "generation_config.json"):
        found = json.loads((source / name).read_text())
        found |= {"bos_token_id": begin, "eos_token_id": [end, begin] if name[0] == "g" else end}
        write_json(source / name, found)


def _biases(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """What of each token's logit the first channel, which the norm makes about 11, is multiplied by."""
    biases = np.full(vocab_size, -4.0, np.float32)
    letters = [id for word, id in tokenizer.get_vocab().items() if word.replace("Ġ", " ") in SAID]
    biases[letters] = 0.0
    ends = [tokenizer.token_to_id(word) for word in ("<|im_end|>", *MARKS)]
    biases[[id for id in ends if id is not None]] = np.log(len(letters) / LENGTH) / 11.3
    biases[tokenizer.token_to_id("<tool_call>")] = -1.0  # where a call is wanted, rather that than a thought
    return biases


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--context", type=int, default=CONTEXT)
    args = parser.parse_args()
    write_talker(args.target, args.tokenizer, args.context)
