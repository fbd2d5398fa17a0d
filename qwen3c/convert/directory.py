"""A Hugging Face directory as a Source: its files, opened with care, and what they say.

    config.json, generation_config.json            -> keys
    tokenizer.json, chat template                  -> as they are (but see Directory.tokenizer)
    tokenizer_config.json, README.md               -> special tokens, licence
    *.safetensors                                  -> tensors

A LoRA adapter is such a directory too, with other files.
"""

from __future__ import annotations

import errno
import json
import os
import re
from io import FileIO
from pathlib import Path

from .. import format
from ..system import mistakes
from ..system.files import reason
from ..text import tokenizer_json
from .source import Keys, SourceError, StoredTensor, cut, open_regular, parse_json, shown

MAX_TEXT = 16 << 20  # bytes accepted of any text file other than tokenizer.json
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
REQUIRED = ("config.json", "tokenizer.json")
OPTIONAL = (  # read where they are there, and with REQUIRED and the safetensors all that is
    "generation_config.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "README.md",
)
_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


class Directory:
    """The files of a directory; leaving the `with` block closes those that were opened. A Source.

    expected: the file that such a directory must have; the error names it if there is no directory.
    """

    group_size = 64
    template_places = "tokenizer_config.json, chat_template.jinja"

    def __init__(self, directory: str | os.PathLike[str], expected: str = "config.json") -> None:
        self.location = path = Path(directory)
        self.opened: list[FileIO] = []
        if not path.is_dir():
            problem = "is not a directory" if path.exists() else "no such directory"
            hint = "" if path.exists() else mistakes.missing_source(os.fspath(directory))
            hint = hint or f"expected one with {expected} and *.safetensors"
            raise SourceError(f"{directory}: {problem}; {hint}")

    def __enter__(self) -> Directory:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self.opened:
            file.close()

    # What the files say

    def config(self) -> Keys:
        hint = "" if self.exists("config.json") else mistakes.directory_without_config(self.location)
        if hint:
            raise SourceError(f"{self.location}: {hint}")
        return self.keys("config.json")

    def generation(self) -> Keys:
        return self.keys("generation_config.json", optional=True)

    def tokenizer(self) -> tuple[Path, bytes]:
        """tokenizer.json, with a step added that puts bos_token first if only tokenizer_config.json asks for
        that.

        transformers does this for LlamaTokenizerFast, the class that DeepSeek's distilled models name.
        """
        path, data = self.path("tokenizer.json"), self.bytes("tokenizer.json", format.MAX_TOKENIZER)
        keys = self.keys("tokenizer_config.json", optional=True)
        if keys.values.get("add_bos_token") is not True:
            return path, data
        bos = self.special_tokens().get("bos_token")
        try:
            tokenizer = tokenizer_json.load(data)
            id = None if bos is None else tokenizer.token_to_id(bos)
            if id is None:
                raise SourceError(
                    f"{keys.path}: add_bos_token is true, but bos_token {shown(bos)} is no token"
                )
            with tokenizer_json.library_errors():
                puts_it_already = id in tokenizer.encode("a").ids[:1]
        except SourceError:
            raise
        except ValueError as error:
            raise SourceError(f"{path}: {cut(error)}") from None
        return path, data if puts_it_already else _with_opening(data, str(bos), id)

    def template(self) -> str:
        """The chat template of chat_template.jinja, else tokenizer_config.json, else chat_template.json."""
        if self.exists("chat_template.jinja"):
            return self.text("chat_template.jinja")
        for name in ("tokenizer_config.json", "chat_template.json"):
            keys = self.keys(name, optional=True)
            template = keys.values.get("chat_template")
            if isinstance(template, list):  # several templates by name; "default" is the one for chat
                default = (t for t in template if isinstance(t, dict) and t.get("name") == "default")
                template = next(default, {}).get("template", template)
            if isinstance(template, str):
                return template
            if template is not None:
                raise SourceError(
                    f"{keys.path}: chat_template is not text, nor a list with an entry 'default'"
                )
        return ""

    def special_tokens(self) -> dict[str, str]:
        """The special tokens of tokenizer_config.json, where each is text or {"content": text}."""
        values, result = self.keys("tokenizer_config.json", optional=True).values, {}
        for key in _SPECIAL_TOKENS:
            value = values.get(key)
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                result[key] = text
        return result

    def licence(self) -> str | None:
        """The value of `license:` in the front matter of the model card."""
        if not self.path("README.md").is_file():
            return None
        card = self.bytes("README.md").decode(errors="replace")
        front_matter = re.match(r"---\s*\n(.*?)\n---", card, re.DOTALL)
        line = re.search(r"^license:[ \t]*(\S.*)$", front_matter[1], re.MULTILINE) if front_matter else None
        return line[1] if line else None

    def tensors(self) -> dict[str, StoredTensor]:
        """Every tensor of every safetensors file."""
        stored: dict[str, StoredTensor] = {}
        for file_name, names in shards(self).items():
            found = open_safetensors(self, file_name)
            path = self.path(file_name)
            for name in sorted(found.keys() & stored.keys()):
                raise SourceError(f"{path}: {cut(name)} is also in {stored[name].path.name}")
            for name in sorted(found.keys() ^ names) if names is not None else ():
                fault = "is here, but not by" if name in found else "is missing, though here by"
                raise SourceError(f"{path}: {cut(name)} {fault} {INDEX_NAME}")
            stored |= found
        return stored

    # The files

    def path(self, name: str) -> Path:
        return self.location / name

    def exists(self, name: str) -> bool:
        return os.path.lexists(self.path(name))

    def open(self, name: str) -> FileIO:
        return open_regular(self.path(name), self.opened)

    def bytes(self, name: str, limit: int = MAX_TEXT) -> bytes:
        file = self.open(name)
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise SourceError(f"{self.path(name)}: {size} bytes, at most {limit} are accepted")
        return file.readall()

    def text(self, name: str) -> str:
        try:
            return self.bytes(name).decode()
        except UnicodeDecodeError as error:
            raise SourceError(f"{self.path(name)}: is not UTF-8: byte {error.start}") from None

    def keys(self, name: str, optional: bool = False) -> Keys:
        """The JSON object in a file. optional: a missing file counts as an empty object."""
        path = self.path(name)
        return Keys(path, {} if optional and not self.exists(name) else parse_json(path, self.bytes(name)))


def _with_opening(data: bytes, bos: str, id: int) -> bytes:
    """tokenizer.json with one more step behind its own: token `bos` before every text."""
    own, first = json.loads(data), {"SpecialToken": {"id": bos, "type_id": 0}}
    text, other = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
    opening = {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, other],
        "special_tokens": {bos: {"id": bos, "ids": [id], "tokens": [bos]}},
    }
    steps = [step for step in (own.get("post_processor"), opening) if step]
    own["post_processor"] = {"type": "Sequence", "processors": steps}
    return json.dumps(own, ensure_ascii=False).encode()


# ----------------------------------------------------------------------------
# Safetensors


def shards(files: Directory) -> dict[str, set[str] | None]:
    """Safetensors file -> the tensors the index places there; None if there is one file and no index."""
    if files.exists(SINGLE_NAME):
        return {SINGLE_NAME: None}
    if not files.exists(INDEX_NAME):
        hint = mistakes.directory_without_weights(files.location)
        raise SourceError(f"{files.location}: has neither {SINGLE_NAME} nor {INDEX_NAME}{hint}")
    index = files.keys(INDEX_NAME)
    weight_map = index.require("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{index.path}: weight_map is not an object that names tensors")
    found: dict[str, set[str] | None] = {}
    for name, file_name in sorted(weight_map.items()):
        # a file name alone: an index must not lead to other folders
        if not isinstance(file_name, str) or not re.fullmatch(r"[^/\\:\0]+\.safetensors", file_name):
            raise SourceError(
                f"{index.path}: {cut(name)}: {shown(file_name)} is not the name of a safetensors file"
            )
        found[file_name] = (found.get(file_name) or set()) | {name}
    return found


def open_safetensors(files: Directory, file_name: str) -> dict[str, StoredTensor]:
    """The tensors of one file: u64 header length, JSON header, tensor bytes without holes."""
    from safetensors import SafetensorError, safe_open

    path, file = files.path(file_name), files.open(file_name)
    file_size = os.fstat(file.fileno()).st_size
    header_size = int.from_bytes(file.read(8), "little")
    if header_size > min(file_size - 8, mistakes.MAX_SAFETENSORS_HEADER):
        raise SourceError(f"{path}: header of {header_size} bytes in a file of {file_size} (cut short?)")
    header = parse_json(path, file.read(header_size))
    header.pop("__metadata__", None)
    start = 8 + header_size
    tensors, end = {}, start
    for name, entry in header.items():
        try:
            first, last = (start + offset for offset in entry["data_offsets"])
            tensors[name] = StoredTensor(name, entry["dtype"], tuple(entry["shape"]), path, file, first)
            end = max(end, last)
        except (TypeError, KeyError, ValueError):
            raise SourceError(f"{path}: {cut(name)}: dtype, shape or data_offsets is wrong") from None
    if end != file_size:
        raise SourceError(f"{path}: {file_size} bytes, its header describes {end} (cut short?)")
    try:
        # the library checks for overlap, holes, and sizes that do not follow from dtype and shape
        with safe_open(path, "numpy"):
            return tensors
    except SafetensorError as error:
        raise SourceError(f"{path}: {cut(error)}") from None
    except OSError:  # the library says "no such file", which is wrong: the file is open already
        limit = reason(OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
        raise SourceError(f"{path}: cannot be opened a second time: {limit}") from None
