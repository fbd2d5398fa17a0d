"""Every supported kind of rotary embedding: what config.json says about it, and its frequencies.

model.bin holds only the table of inverse frequencies, so only this module knows how each kind computes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .. import format
from .source import Keys, SourceError, shown

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Rope:
    """The numbers of a rotary embedding; `factor` is how far its context is stretched."""

    type: str
    theta: float
    head_dim: int
    attention_scale: float = 1.0  # factor on cos and sin
    factor: float = 1.0
    original_context: int = 0  # yarn, llama3: the context before it was stretched
    beta_fast: float = 32.0  # yarn: a pair that makes more turns in original_context keeps its frequency
    beta_slow: float = 1.0  # yarn: the frequency of a pair that makes fewer turns is divided by `factor`
    truncate: bool = True  # yarn: the ramp between the two limits begins and ends at a whole pair
    low_freq_factor: float = 1.0  # llama3: its name for beta_slow
    high_freq_factor: float = 4.0  # llama3: its name for beta_fast

    @property
    def number(self) -> int:
        return next(n for n, name in format.ROPE_TYPES.items() if name == self.type)

    def description(self) -> dict[str, Any]:
        """The numbers that this type uses, for the metadata."""
        fields = ["type", "theta", "attention_scale", *_ROPE_FIELDS[self.type]]
        return {field: getattr(self, field) for field in dict.fromkeys(fields)}


def _default_frequencies(rope: Rope) -> NDArray[np.float64]:
    """theta^(-2i / head_dim), i = 0 .. head_dim / 2 - 1 (Su et al. 2021, equation 15)."""
    import numpy as np

    return rope.theta ** (-2.0 * np.arange(rope.head_dim // 2) / rope.head_dim)


def _linear_frequencies(rope: Rope) -> NDArray[np.float64]:
    """Every frequency divided by `factor` (position interpolation, Chen et al. 2023)."""
    return _default_frequencies(rope) / rope.factor


def _yarn_frequencies(rope: Rope) -> NDArray[np.float64]:
    """Fast pairs keep their frequency, slow ones have it divided by `factor`; between the two limits a linear
    ramp mixes both (YaRN, Peng et al. 2023, 3.2)."""
    import numpy as np

    def pair(turns: float) -> float:
        """The index, not rounded, of the pair that makes `turns` turns in the original context."""
        period = rope.original_context / (turns * 2 * math.pi)
        return rope.head_dim * math.log(period) / (2 * math.log(rope.theta))

    low, high = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.head_dim - 1)
    high += 0.001 * (low == high)
    ramp = np.clip((np.arange(rope.head_dim // 2) - low) / (high - low), 0, 1)
    frequencies = _default_frequencies(rope)
    return frequencies / rope.factor * ramp + frequencies * (1 - ramp)


def _llama3_frequencies(rope: Rope) -> NDArray[np.float64]:
    """As yarn, but the ramp is linear in the turns a pair makes, from low_freq_factor to high_freq_factor."""
    import numpy as np

    frequencies = _default_frequencies(rope)
    turns = rope.original_context * frequencies / (2 * math.pi)
    width = rope.high_freq_factor - rope.low_freq_factor
    kept = np.clip((turns - rope.low_freq_factor) / width, 0, 1)
    return frequencies / rope.factor * (1 - kept) + frequencies * kept


_FREQUENCIES: dict[str, Callable[[Rope], NDArray[np.float64]]] = {
    "default": _default_frequencies,
    "linear": _linear_frequencies,
    "yarn": _yarn_frequencies,
    "llama3": _llama3_frequencies,
}
# Field of Rope -> key of the rope dict; those of _ROPE_OPTIONS may be missing
_ROPE_FIELDS: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "yarn": {"factor": "factor", "original_context": "original_max_position_embeddings"},
    "llama3": {
        "factor": "factor",
        "original_context": "original_max_position_embeddings",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
    },
}
_ROPE_OPTIONS = {"yarn": ("beta_fast", "beta_slow", "truncate")}
_ANY_ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
# DeepSeek-R1-0528-Qwen3-8B has attn_factor, which transformers ignores: export.py --yarn-attn-factor sets it
_YARN_SCALE_KEYS = {"attention_factor", "mscale", "mscale_all_dim", "attn_factor"}


def read_rope(keys: Keys, head_dim: int) -> Rope:
    """The rope that config.json describes, in the form of transformers 4 or 5."""
    name, values = _rope_object(keys)
    rope_type = values.get("rope_type", values.get("type", "default"))
    if not isinstance(rope_type, str) or rope_type not in _FREQUENCIES:
        supported = ", ".join(_FREQUENCIES)
        raise SourceError(
            f"{keys.path}: rope type {shown(rope_type)} is not supported (supported: {supported})"
        )
    known = _ANY_ROPE_KEYS | {*_ROPE_FIELDS[rope_type].values(), *_ROPE_OPTIONS.get(rope_type, ())}
    unknown = sorted(values.keys() - known - (_YARN_SCALE_KEYS if rope_type == "yarn" else set()))
    if unknown:
        raise SourceError(f"{keys.path}: unknown key {shown(unknown[0])} beside rope type {rope_type!r}")
    if values.get("partial_rotary_factor") not in (None, 1.0):
        factor = values["partial_rotary_factor"]
        raise SourceError(f"{keys.path}: partial_rotary_factor is {shown(factor)}, supported: 1.0")
    nested = Keys(keys.path, values)
    theta = nested.number("rope_theta") if "rope_theta" in values else keys.number("rope_theta")
    if keys.values.get("rope_theta") is not None and keys.number("rope_theta") != theta:
        other = keys.values["rope_theta"]
        raise SourceError(f"{keys.path}: rope_theta is {shown(other)} and, in {name}, {theta!r}")
    return _checked(keys, _read_rope_numbers(nested, Rope(rope_type, theta, head_dim)))


def _rope_object(keys: Keys) -> tuple[str, dict[str, Any]]:
    """(key, object) of rope_parameters (transformers 5) or rope_scaling (4); the object is empty without
    either.
    """
    found = [key for key in ("rope_parameters", "rope_scaling") if keys.values.get(key)]
    if not found:
        return "", {}
    name, values = found[0], keys.values[found[0]]
    if len(found) == 2 and values != keys.values[found[1]]:
        raise SourceError(f"{keys.path}: rope_parameters and rope_scaling contradict each other")
    if isinstance(values, dict) and values.keys() == {
        "full_attention"
    }:  # transformers 5 may nest by layer type
        values = values["full_attention"]
    if not isinstance(values, dict):
        raise SourceError(f"{keys.path}: {name} is {shown(values)}, expected an object")
    return name, values


def _read_rope_numbers(keys: Keys, rope: Rope) -> Rope:
    """`rope` with the numbers that its type takes from the rope object."""
    numbers: dict[str, Any] = {}
    for field, key in _ROPE_FIELDS[rope.type].items():
        numbers[field] = keys.integer(key) if field == "original_context" else keys.number(key)
    for key in _ROPE_OPTIONS.get(rope.type, ()):
        if keys.values.get(key) is not None:
            numbers[key] = keys.flag(key) if key == "truncate" else keys.number(key)
    if rope.type == "yarn":
        scales = keys.numbers(("attention_factor", "mscale", "mscale_all_dim"))
        numbers["attention_scale"] = float(
            scales.get("attention_factor", _yarn_scale(numbers["factor"], scales))
        )
    return replace(rope, **numbers)


def _yarn_scale(factor: float, scales: dict[str, int | float]) -> float:
    """The factor on cos and sin: 0.1 ln(factor) + 1 (YaRN, 3.4).

    With mscale and mscale_all_dim, which are DeepSeek's, it is the quotient of two such scales.
    """

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    numerator, denominator = scales.get("mscale"), scales.get("mscale_all_dim")
    if not numerator or not denominator:
        return scale(1)
    return scale(numerator) / (scale(denominator) or math.nan)  # NaN for a divisor of 0: _checked refuses it


def _checked(keys: Keys, rope: Rope) -> Rope:
    """Return `rope` if its frequencies can be computed, else raise SourceError."""
    limits = (
        ("factor", 1 <= rope.factor <= 1e6),
        ("original_context", 1 <= rope.original_context <= 1 << 24 or rope.type in ("default", "linear")),
        ("beta_slow", 1e-6 <= rope.beta_slow < rope.beta_fast <= 1e6),
        ("low_freq_factor", 0 <= rope.low_freq_factor < rope.high_freq_factor <= 1e6),
        ("theta", rope.theta > 1 or rope.type != "yarn"),
    )
    for field, sound in limits:
        if not sound:
            value = shown(getattr(rope, field))
            raise SourceError(f"{keys.path}: rope type {rope.type!r}: {field} = {value} is out of range")
    return rope


def stretched(keys: Keys, rope: Rope, factor: float | None, attention_scale: float | None) -> Rope:
    """`rope` stretched by YaRN by `factor`, or with another attention_scale; None leaves that as it is."""
    if factor is not None:
        if rope.type != "default":
            raise SourceError(f"{keys.path}: --yarn {factor:g}: the rope is {rope.type!r} already")
        if not factor > 1:
            raise SourceError(f"{keys.path}: --yarn {factor:g}: the factor must be more than 1")
        context = keys.integer("max_position_embeddings")
        # Qwen3 was trained on 32,768 positions; its config.json adds 8,192 (its model card)
        original = 32768 if context == 40960 else context
        scale = _yarn_scale(factor, {})
        rope = replace(rope, type="yarn", factor=factor, original_context=original, attention_scale=scale)
    if attention_scale is not None:
        if rope.type != "yarn":
            raise SourceError(f"{keys.path}: --yarn-attn-factor: the rope is {rope.type!r}, not 'yarn'")
        rope = replace(rope, attention_scale=attention_scale)
    return _checked(keys, rope)


def inverse_frequencies(rope: Rope) -> NDArray[np.float32]:
    """Radians per position of each pair, shape (head_dim / 2,): float64 rounded once to float32."""
    import numpy as np

    return _FREQUENCIES[rope.type](rope).astype(np.float32)
