"""Tokenizers of new models: characters, or byte-level BPE trained on the data.

Both are ordinary tokenizer.json files, as transformers, export.py and the engine read them.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..convert.gguf_vocabulary import PRE_TOKENIZERS
from ..text.tokenizer import without_added_tokens
from . import TrainingError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

SPLIT_PATTERN = PRE_TOKENIZERS["qwen2"].pattern
END_OF_TEXT, START_OF_TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")  # tokens that skip_special_tokens keeps

CHARACTERS = "\n\t" + "".join(c for c in string.printable if c.isprintable())  # printable ASCII
PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
ENCODED_AT_ONCE = 64  # documents encoded in one call, which uses all cores
UNKNOWN_SHOWN = 5  # how many missing characters an error names

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


def end_of_text(tokenizer: PreTrainedTokenizerFast) -> int:
    """The token that ends a document and pads rows. TrainingError if the vocabulary has none."""
    for id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(id, int):
            return id
    raise TrainingError("the tokenizer has neither pad_token nor eos_token: nothing can end a text")


class TextEncoder:
    """Text -> tokens as the engine encodes it: what looks like a control token is text like any other."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._plain = without_added_tokens(tokenizer.backend_tokenizer)
        self._unknown = tokenizer.unk_token_id

    def encode(self, text: str, name: str) -> list[int]:
        """The tokens of one text. TrainingError, with its name, for characters that the vocabulary lacks."""
        return next(self.encode_all([(name, text)]))

    def encode_all(self, texts: Iterable[tuple[str, str]]) -> Iterator[list[int]]:
        """The tokens of each (name, text), one text after the other."""
        remaining = iter(texts)
        while batch := list(itertools.islice(remaining, ENCODED_AT_ONCE)):
            encodings = self._plain.encode_batch([text for _, text in batch], add_special_tokens=False)
            for (name, text), encoding in zip(batch, encodings, strict=True):
                ids = list(encoding.ids)
                if self._unknown is not None and self._unknown in ids:
                    raise self._cannot_say(name, text, encoding)
                yield ids

    def _cannot_say(self, name: str, text: str, encoding: Any) -> TrainingError:
        unknown = [
            text[start:end]
            for id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
            if id == self._unknown
        ]
        kinds = list(dict.fromkeys(unknown))
        shown = ", ".join(map(repr, kinds[:UNKNOWN_SHOWN])) + (", ..." if len(kinds) > UNKNOWN_SHOWN else "")
        return TrainingError(
            f"{name}: the tokenizer has no token for {len(unknown):,} of {len(text):,} characters ({shown}); "
            "--tokenizer bpe takes any text"
        )


def load(directory: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a Hugging Face directory, by its tokenizer.json."""
    from transformers import AutoTokenizer

    if not (Path(directory) / "tokenizer.json").is_file():
        raise TrainingError(f"{directory}: has no tokenizer.json")
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the libraries raise errors of any type
        raise TrainingError(f"{directory}: tokenizer: {' '.join(str(error).split())[:300]}") from None
    return tokenizer
