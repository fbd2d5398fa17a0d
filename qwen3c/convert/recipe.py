"""Which encoding each matrix of a model gets: --bits and --recipe.

    encoding = "int4"                 # of the matrices that no rule names
    group_size = 32                   # weights that share a scale; may be left out

    [[matrices]]                      # a later rule wins over an earlier one
    names = ["*.v_proj.weight", "output"]
    encoding = "int6"

    [[matrices]]
    names = ["*.down_proj.weight"]
    layers = [0, 1, -1]               # -1 is the last; or "more"; without it all
    encoding = "int8"

Names are Hugging Face's, with * ? [abc] as in a shell. "output" is the matrix of the logits: lm_head.weight,
or the embedding where both are one. Layers "more" are the first eighth, the last eighth and every third
between: those that llama.cpp's K mixes give more bits.
"""

from __future__ import annotations

import collections
import fnmatch
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import format
from .gguf_blocks import KINDS
from .source import SourceError, shown

GROUP_SIZE = 32  # of a recipe that names none
MAX_RECIPE = 1 << 16  # bytes of a recipe's file
_KEYS = {"encoding", "group_size", "matrices"}
_RULE_KEYS = {"names", "layers", "encoding"}
_ENCODINGS = {encoding.value: encoding for encoding in format.ENCODINGS}
_LAYER = re.compile(r"model\.layers\.(\d+)\.")

_K_V_OUTPUT = {"names": ["*.k_proj.weight", "*.v_proj.weight", "output"], "encoding": "int6"}
# --bits: what was measured to lose least for its size (docs/FIDELITY.md)
BITS: dict[str, dict[str, Any]] = {
    "4": {"encoding": "int4", "matrices": [_K_V_OUTPUT]},
    "4.5": {
        "encoding": "int4",
        "matrices": [
            _K_V_OUTPUT,
            {"names": ["*.down_proj.weight"], "layers": "more", "encoding": "int6"},
        ],
    },
    "5": {
        "encoding": "int4",
        "matrices": [
            _K_V_OUTPUT,
            {"names": ["*.down_proj.weight", "*.o_proj.weight"], "encoding": "int6"},
        ],
    },
    "6": {"encoding": "int6"},
    "8": {"encoding": "int8"},
}


@dataclass(frozen=True)
class Rule:
    """An encoding for the matrices whose names match one of the patterns, in some layers or in all."""

    names: tuple[str, ...]
    layers: tuple[int, ...] | str | None
    encoding: format.Encoding

    def matches(self, name: str, config: format.Config) -> bool:
        """Whether the rule is about the matrix of this Hugging Face name."""
        output = "model.embed_tokens.weight" if config.tied_embedding else "lm_head.weight"
        patterns = [output if pattern == "output" else pattern for pattern in self.names]
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            return False
        layer = _LAYER.match(name)
        return self.layers is None or (layer is not None and self._has(int(layer[1]), config.n_layers))

    def _has(self, layer: int, n_layers: int) -> bool:
        if isinstance(self.layers, tuple):
            return layer in self.layers or layer - n_layers in self.layers
        return gets_more(layer, n_layers)


def gets_more(layer: int, n_layers: int) -> bool:
    """Whether llama.cpp's K mixes give a layer more bits: first and last eighth, every third between."""
    eighth = n_layers // 8
    return layer < eighth or layer >= 7 * n_layers // 8 or (layer - eighth) % 3 == 2


@dataclass(frozen=True)
class Recipe:
    """An encoding for every matrix. `table` is what it was made of, as the metadata of a model.bin has it."""

    encoding: format.Encoding
    group_size: int | None
    rules: tuple[Rule, ...]
    table: dict[str, Any]
    location: str  # for error messages

    @property
    def is_int8(self) -> bool:
        """Whether every matrix is INT8, as without a recipe."""
        return {self.encoding, *(rule.encoding for rule in self.rules)} == {format.Encoding.INT8}

    def encodings(self, config: format.Config) -> format.Encodings:
        """The encoding of every matrix. SourceError if a rule is about none, or the engine lacks the mix."""
        names = format.matrices(config)
        result = dict.fromkeys(names, self.encoding)
        for number, rule in enumerate(self.rules, 1):
            named = [name for name in names if rule.matches(name, config)]
            if not named:
                patterns = ", ".join(rule.names)
                raise SourceError(f"{self.location}: matrices {number}: no matrix is {shown(patterns)}")
            result |= dict.fromkeys(named, rule.encoding)
        try:
            format.tensors(config, result)
        except ValueError as error:
            raise SourceError(f"{self.location}: {error}") from None
        return result


def of_source(dtypes: Mapping[str, str], config: format.Config) -> Recipe | None:
    """What the matrices of a source get that are no recipe's: a GGUF file's blocks as gguf_blocks.KINDS says.

    dtypes: of every matrix by its Hugging Face name. None if all are INT8. A gate and its up get what holds
    both.
    """
    encodings = {name: _of_dtype(dtypes[name]) for name in format.matrices(config)}
    for gate in [name for name in encodings if name.endswith(".gate_proj.weight")]:
        up = gate.replace(".gate_proj.", ".up_proj.")
        encodings[gate] = encodings[up] = max(encodings[gate], encodings[up], key=lambda e: e.bits)
    counts = collections.Counter(encodings.values())
    commonest = max(format.ENCODINGS, key=lambda encoding: counts[encoding])
    if counts.keys() == {format.Encoding.INT8}:
        return None
    table = {"encoding": commonest.value, "group_size": GROUP_SIZE, "matrices": _rules(encodings, commonest)}
    return parse(table, "the recipe of the file")


def _of_dtype(dtype: str) -> format.Encoding:
    return KINDS[dtype].encoding if dtype in KINDS else format.Encoding.INT8


def _rules(encodings: format.Encodings, commonest: format.Encoding) -> list[dict[str, Any]]:
    """Rules for the matrices of another encoding than the commonest; one for each kind of matrix, its layers
    listed.
    """
    layers: dict[tuple[str, format.Encoding], dict[int, None]] = {}
    for name, encoding in encodings.items():
        layer = _LAYER.match(name)
        if encoding is not commonest:
            kind = re.sub(r"\.experts\.\d+\.", ".experts.*.", f"*.{name[layer.end() :]}" if layer else name)
            layers.setdefault((kind, encoding), {}).update({int(layer[1]): None} if layer else {})
    return [
        {"names": [kind], **({"layers": [*which]} if which else {}), "encoding": encoding.value}
        for (kind, encoding), which in layers.items()
    ]


def of_bits(bits: str) -> Recipe:
    """The recipe of --bits. SourceError if there is none."""
    if bits not in BITS:
        raise SourceError(f"--bits is {shown(bits)}, not one of {', '.join(BITS)}")
    return parse(BITS[bits], f"--bits {bits}")


def read(path: str) -> Recipe:
    """The recipe in a TOML file. SourceError, one line, if it is none; OSError if it cannot be read."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        try:
            import tomli as tomllib
        except ImportError:
            raise SourceError(f"{path}: TOML needs tomli before Python 3.11: pip install tomli") from None
    with Path(path).open("rb") as file:
        data = file.read(MAX_RECIPE + 1)
    if len(data) > MAX_RECIPE:
        raise SourceError(f"{path}: a recipe has at most {MAX_RECIPE} bytes")
    try:
        table = tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SourceError(f"{path}: not TOML: {error}") from None
    return parse(table, path)


def parse(table: dict[str, Any], location: str) -> Recipe:
    """A recipe from its table, every key checked. SourceError names the key and what it holds."""
    _check_keys(table, _KEYS, location)
    group_size = table.get("group_size")
    if group_size is not None and group_size not in format.GROUP_SIZES:
        sizes = ", ".join(map(str, format.GROUP_SIZES))
        raise SourceError(f"{location}: group_size is {shown(group_size)}, not one of {sizes}")
    rules = table.get("matrices", [])
    if not isinstance(rules, list) or not all(isinstance(rule, dict) for rule in rules):
        raise SourceError(f"{location}: matrices is {shown(rules)}, not tables [[matrices]]")
    parsed = tuple(_rule(rule, f"{location}: matrices {number}") for number, rule in enumerate(rules, 1))
    return Recipe(_encoding(table, location), group_size, parsed, table, location)


def _rule(table: dict[str, Any], location: str) -> Rule:
    _check_keys(table, _RULE_KEYS, location)
    names, layers = table.get("names"), table.get("layers")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise SourceError(f"{location}: names is {shown(names)}, not a list of names")
    if isinstance(layers, list) and all(type(layer) is int for layer in layers):
        layers = tuple(layers)
    elif layers is not None and layers != "more":
        raise SourceError(f"{location}: layers is {shown(layers)}, not a list of numbers or 'more'")
    return Rule(tuple(names), layers, _encoding(table, location))


def _encoding(table: Mapping[str, Any], location: str) -> format.Encoding:
    value = table.get("encoding")
    if not isinstance(value, str) or value not in _ENCODINGS:
        raise SourceError(f"{location}: encoding is {shown(value)}, not one of {', '.join(_ENCODINGS)}")
    return _ENCODINGS[value]


def _check_keys(table: Mapping[str, Any], known: set[str], location: str) -> None:
    for key in table:
        if key not in known:
            raise SourceError(f"{location}: unknown key {shown(key)}; known are {', '.join(sorted(known))}")
