"""Tokenizers of new models: characters, or byte-level BPE trained on the data.

Both are ordinary tokenizer.json files, as transformers, export.py and the engine read them.
"""

from __future__ import annotations

import string
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..gguf import PRE_TOKENIZERS
from . import TrainingError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

SPLIT_PATTERN = PRE_TOKENIZERS["qwen2"].pattern
END_OF_TEXT, START_OF_TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")  # ordinary text to skip_special_tokens

CHARACTERS = "\n\t" + "".join(c for c in string.printable if c.isprintable())  # printable ASCII
PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"

CHAT_TEMPLATE = """\
{%- if tools %}{{ raise_exception("this model calls no tools") }}{% endif -%}
{%- for message in messages -%}
{{ "<|im_start|>" + message.role + "\\n" + message.content + "<|im_end|>\\n" }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\\n" }}{% endif -%}
"""


def train_bpe(documents: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocab_size` tokens, Qwen's split pattern, chat and think tokens reserved.

    Every text has tokens (bytes are the alphabet). The end of a text is <|endoftext|>, of a turn <|im_end|>.
    """
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        trainers,
    )

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = [END_OF_TEXT, START_OF_TURN, END_OF_TURN]
    smallest = len(alphabet) + len(specials) + len(TAGS)
    if vocab_size < smallest:
        raise TrainingError(f"vocabulary of {vocab_size} tokens: bytes and chat tokens alone take {smallest}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(specials) - len(TAGS),
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in specials])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in TAGS])
    return _wrapped(tokenizer, eos_token=END_OF_TURN, pad_token=END_OF_TEXT, chat_template=CHAT_TEMPLATE)


def characters() -> PreTrainedTokenizerFast:
    """Printable ASCII, newline and tab, one token each, <pad> and <eos>; any other character is <unk>."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {c: i for i, c in enumerate([UNKNOWN, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in (PAD, EOS)])
    return _wrapped(tokenizer, eos_token=EOS, pad_token=PAD, unk_token=UNKNOWN)


def _wrapped(tokenizer: Tokenizer, **settings: str) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    fast: Any = PreTrainedTokenizerFast
    return fast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, bos_token=None, **settings)


def load(directory: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a Hugging Face directory, by its tokenizer.json."""
    from transformers import AutoTokenizer

    if not (Path(directory) / "tokenizer.json").is_file():
        raise TrainingError(f"{directory}: has no tokenizer.json")
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the libraries raise what they like
        raise TrainingError(f"{directory}: tokenizer: {' '.join(str(error).split())[:300]}") from None
    return tokenizer
