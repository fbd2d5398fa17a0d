"""The vocabulary of a GGUF file -> the tokenizer.json that it was made from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ..text import pieces
from .source import Keys, SourceError, shown

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


@dataclass(frozen=True)
class _PreTokenizer:
    """The settings that a name in tokenizer.ggml.pre stands for."""

    pattern: str
    nfc: bool
    ignore_merges: bool  # a whole word that is a token is that token, whatever the merges
    add_bos: bool  # the default of tokenizer.ggml.add_bos_token


_QWEN2 = _PreTokenizer(pieces.QWEN2, nfc=True, ignore_merges=False, add_bos=False)
_LLAMA3 = _PreTokenizer(pieces.LLAMA3, nfc=False, ignore_merges=True, add_bos=True)
PRE_TOKENIZERS = {"qwen2": _QWEN2, "deepseek-r1-qwen": _QWEN2, "llama-bpe": _LLAMA3}

# Control tokens that end a text in any model that has them; the file's keys name only one or two ids
_END_TOKENS = {
    *("<|endoftext|>", "<|im_end|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"),
    "<｜end▁of▁sentence｜>",
}


class GGUFVocabulary:
    """The tables tokenizer.ggml.*: byte-level BPE, as tokenizer.json has it.

    Ids must be ordinary tokens, then control and added tokens, then unused ones: the only order that
    Hugging Face's tokenizers can have. The flags of added tokens (lstrip, rstrip, ...) are not in GGUF.
    """

    def __init__(self, keys: Keys) -> None:
        self.keys = keys
        model = keys.require("tokenizer.ggml.model")
        if model != "gpt2":
            raise SourceError(f"{keys.path}: tokenizer.ggml.model is {shown(model)}, supported: 'gpt2'")
        pre = keys.require("tokenizer.ggml.pre")
        if not isinstance(pre, str) or pre not in PRE_TOKENIZERS:
            supported = ", ".join(PRE_TOKENIZERS)
            raise SourceError(f"{keys.path}: tokenizer.ggml.pre is {shown(pre)}, supported: {supported}")
        self.pre = PRE_TOKENIZERS[pre]
        self.tokens, self.kinds = self._tokens()
        self.add_bos = keys.values.get("tokenizer.ggml.add_bos_token", self.pre.add_bos)
        self.eos_ids = self._eos_ids()
        self.special_tokens = self._special_tokens()

    def tokenizer_json(self) -> str:
        """The text of a tokenizer.json. The library `tokenizers` checks its merges."""
        n = self.kinds.count(_NORMAL)
        added = [
            {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False}
            | {"normalized": False, "special": self.kinds[i] == _CONTROL}
            for i, token in enumerate(self.tokens)
            if self.kinds[i] in (_CONTROL, _USER_DEFINED)
        ]
        byte_level = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        }
        split = {
            "type": "Split",
            "pattern": {"Regex": self.pre.pattern},
            "behavior": "Isolated",
            "invert": False,
        }
        model = {"type": "BPE", "ignore_merges": self.pre.ignore_merges, "byte_fallback": False}
        model |= {"dropout": None, "unk_token": None, "fuse_unk": False}
        model |= {"vocab": {token: i for i, token in enumerate(self.tokens[:n])}, "merges": self._merges()}
        tokenizer = {
            "version": "1.0",
            "added_tokens": added,
            "normalizer": {"type": "NFC"} if self.pre.nfc else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "post_processor": self._bos_processor() if self.add_bos else byte_level,
            "decoder": byte_level,
            "model": model,
        }
        return json.dumps(tokenizer, ensure_ascii=False)

    def _tokens(self) -> tuple[list[str], list[int]]:
        """Tokens and their kinds by id, without the unused ones at the end."""
        tokens, kinds = (
            self._list(f"tokenizer.ggml.{name}", kind)
            for name, kind in (("tokens", str), ("token_type", int))
        )
        if len(tokens) != len(kinds):
            raise self._fault(f"{len(tokens)} tokens, but tokenizer.ggml.token_type has {len(kinds)}")
        used = len(kinds)
        while used and kinds[used - 1] == _UNUSED:
            used -= 1
        tokens, kinds = tokens[:used], kinds[:used]
        rank = {_NORMAL: 0, _CONTROL: 1, _USER_DEFINED: 1}
        highest = 0
        for i, kind in enumerate(kinds):
            if rank.get(kind, -1) < highest:
                raise self._fault(f"token {i} ({shown(tokens[i])}) has kind {kind}, which cannot be there")
            highest = rank[kind]
        last = {token: i for i, token in enumerate(tokens)}
        for i, token in enumerate(tokens):
            if last[token] != i:
                raise self._fault(f"tokens {i} and {last[token]} are both {shown(token)}")
        return tokens, kinds

    def _merges(self) -> list[list[str]]:
        merges = [merge.split(" ") for merge in self._list("tokenizer.ggml.merges", str)]
        for i, merge in enumerate(merges):
            if len(merge) != 2 or not all(merge):
                raise self._fault(
                    f"tokenizer.ggml.merges[{i}] is {shown(' '.join(merge))}, expected two tokens"
                )
        return merges

    def _bos_processor(self) -> dict[str, Any]:
        """The step of tokenizer.json that puts the begin-of-text token before a text."""
        bos = self.special_tokens.get("bos_token")
        if bos is None:
            raise self._fault("tokenizer.ggml.add_bos_token is set, but there is no bos_token_id")
        first, text = {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
        second = {"Sequence": {"id": "B", "type_id": 1}}
        return {
            "type": "TemplateProcessing",
            "single": [first, text],
            "pair": [first, text, first, second],
            "special_tokens": {bos: {"id": bos, "ids": [self.tokens.index(bos)], "tokens": [bos]}},
        }

    def _eos_ids(self) -> list[int]:
        """Ids that end a text: those of the keys for eos, end of turn and end of message, and tokens known by
        name.
        """
        ids = [self._id("eos"), self._id("eot"), self._id("eom")]
        ids += [i for i, t in enumerate(self.tokens) if t in _END_TOKENS and self.kinds[i] == _CONTROL]
        found = list(dict.fromkeys(i for i in ids if i is not None))
        if not found:
            self.keys.require("tokenizer.ggml.eos_token_id")
        return found

    def _special_tokens(self) -> dict[str, str]:
        """bos_token and the like; no bos_token, which Qwen's files name too, if it is never put before a
        text.
        """
        ids = {
            name: self._id(name)
            for name in ("bos", "eos", "padding", "unknown")
            if name != "bos" or self.add_bos
        }
        short = {"padding": "pad", "unknown": "unk"}
        return {f"{short.get(name, name)}_token": self.tokens[i] for name, i in ids.items() if i is not None}

    def _id(self, name: str) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        if key not in self.keys.values:
            return None
        token = self.keys.integer(key)
        if not 0 <= token < len(self.tokens):
            raise self._fault(f"{key} is {token}, but tokens end at {len(self.tokens) - 1}")
        return token

    def _list(self, key: str, kind: type) -> list[Any]:
        values = self.keys.require(key)
        if not isinstance(values, list) or not all(type(value) is kind for value in values):
            raise self._fault(f"{key} is not a list of {'texts' if kind is str else 'integers'}")
        return values

    def _fault(self, message: str) -> SourceError:
        return SourceError(f"{self.keys.path}: {message}")
