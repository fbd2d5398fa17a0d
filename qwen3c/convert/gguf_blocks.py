"""The blocks of weights that GGUF files hold (ggml), as numpy decodes them, bit for bit as ggml does.

A block is a few fields in a row, such as an fp16 scale and 32 nibbles. Whatever its kind, it decodes to
groups of codes:

    weight = scale * code, or scale * code + minimum        in float32

Where a scale is an fp16, a group 32 weights and there is no minimum, an encoding of model.bin that has the
codes holds the weights exactly (taking_over.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ..format import Encoding

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PIECE_WEIGHTS = 1 << 16  # weights that are decoded at a time: what is in between fits in a core's cache

_Q4_0 = tuple(range(-8, 8))
_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# the same in 6 bits, and how much smaller: of all such codes those that are nearest for normal weights
_IQ4_6_BITS, _IQ4_UNIT = (-29, -24, -19, -15, -11, -8, -5, -2, 0, 3, 6, 9, 12, 16, 20, 26), 4.365
_MXFP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # twice the numbers of E2M1


class Decoded(NamedTuple):
    """Groups of codes: weight = scale * code, + minimum where there is one."""

    codes: NDArray[np.int8]  # (groups, weights in a group)
    scales: NDArray[np.float32]  # (groups,)
    minima: NDArray[np.float32] | None = None  # (groups,)

    def weights(self) -> NDArray[np.float32]:
        """(groups, weights in a group)"""
        import numpy as np

        # what is not finite is found where the weights are rounded
        with np.errstate(invalid="ignore", over="ignore"):
            weights = np.multiply(self.codes, self.scales[:, None], dtype=np.float32)
            if self.minima is not None:
                weights += self.minima[:, None]
        return weights


@dataclass(frozen=True)
class Kind:
    """A kind of block."""

    weights: int  # in a block
    fields: tuple[tuple[Any, ...], ...]  # of numpy's dtype
    decode: Callable[[NDArray[Any]], Decoded]
    encoding: Encoding  # of its weights unless a recipe says otherwise
    largest: int = 0  # magnitude of a code; 0 if a group has not 32 weights, or has a minimum
    codes: tuple[int, ...] = ()  # where there are no more than 16, in the order of a codebook
    codebook: tuple[int, ...] = ()  # of INT4, for `codes`: the same, or ...
    unit: float = 1.0  # ... divided by this and rounded

    @property
    def size(self) -> int:
        """Bytes of a block."""
        return sum(int(kind[-1]) * (shape[0] if shape else 1) for _, kind, *shape in self.fields)

    def blocks(self, data: memoryview) -> NDArray[Any]:
        """The blocks in `data`, which holds whole ones, as numpy sees them."""
        import numpy as np

        return np.frombuffer(data, np.dtype([*self.fields]))


def dequantize(data: memoryview, kind: str) -> NDArray[np.float32]:
    """The weights in `data`, which holds whole blocks, (n,)."""
    import numpy as np

    blocks = KINDS[kind].blocks(data)
    step = PIECE_WEIGHTS // KINDS[kind].weights
    result = np.empty((len(blocks), KINDS[kind].weights), np.float32)
    for i in range(0, len(blocks), step):
        weights = KINDS[kind].decode(blocks[i : i + step]).weights()
        result[i : i + step] = weights.reshape(-1, KINDS[kind].weights)
    return result.ravel()


# ----------------------------------------------------------------------------
# Blocks of 32 weights


def _halves(nibbles: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(..., n) bytes as (..., 2, n): their low halves, then their high halves."""
    import numpy as np

    result = np.empty((*nibbles.shape[:-1], 2, nibbles.shape[-1]), np.uint8)
    np.bitwise_and(nibbles, 15, out=result[..., 0, :])
    np.right_shift(nibbles, 4, out=result[..., 1, :])
    return result


def _nibbles(blocks: NDArray[Any]) -> NDArray[np.uint8]:
    """Codes 0..15, (blocks, 32)."""
    return _halves(blocks["nibbles"]).reshape(-1, 32)


def _fifth_bits(blocks: NDArray[Any]) -> NDArray[np.uint8]:
    """Codes 0..31, (blocks, 32): nibbles and one more bit of each."""
    import numpy as np

    high = np.unpackbits(blocks["bits"], axis=-1, bitorder="little")
    return _nibbles(blocks) | high << np.uint8(4)


def _signed(codes: NDArray[np.uint8], offset: int) -> NDArray[np.int8]:
    """codes - offset."""
    import numpy as np

    return codes.view(np.int8) - np.int8(offset)


def _float(values: NDArray[Any]) -> NDArray[np.float32]:
    import numpy as np

    return values.astype(np.float32)


def _table(codes: NDArray[np.uint8], values: tuple[int, ...]) -> NDArray[np.int8]:
    import numpy as np

    return np.take(np.array(values, np.int8), codes)


def _q4_0(blocks: NDArray[Any]) -> Decoded:
    return Decoded(_signed(_nibbles(blocks), 8), _float(blocks["scale"]))


def _q4_1(blocks: NDArray[Any]) -> Decoded:
    return Decoded(_signed(_nibbles(blocks), 0), _float(blocks["scale"]), _float(blocks["minimum"]))


def _q5_0(blocks: NDArray[Any]) -> Decoded:
    return Decoded(_signed(_fifth_bits(blocks), 16), _float(blocks["scale"]))


def _q5_1(blocks: NDArray[Any]) -> Decoded:
    return Decoded(_signed(_fifth_bits(blocks), 0), _float(blocks["scale"]), _float(blocks["minimum"]))


def _q8_0(blocks: NDArray[Any]) -> Decoded:
    return Decoded(blocks["codes"], _float(blocks["scale"]))


def _iq4_nl(blocks: NDArray[Any]) -> Decoded:
    return Decoded(_table(_nibbles(blocks), _IQ4), _float(blocks["scale"]))


def _mxfp4(blocks: NDArray[Any]) -> Decoded:
    """The scale is 2^(exponent - 128): half of E8M0's, as the codes are twice E2M1's."""
    import numpy as np

    exponents = blocks["exponent"].astype(np.int32)
    return Decoded(_table(_nibbles(blocks), _MXFP4), np.ldexp(np.float32(1), exponents - 128))


# ----------------------------------------------------------------------------
# Blocks of 256 weights, with two levels of scales


def _scales_and_minima(blocks: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Of the 8 groups of Q4_K and Q5_K, (8 blocks,) each: 6 bits each, in 12 bytes."""
    import numpy as np

    low, middle, high = blocks["scales"].reshape(-1, 3, 4).transpose(1, 0, 2)
    scales = np.concatenate([low & 63, high & 15 | low >> 2 & 48], axis=-1)
    minima = np.concatenate([middle & 63, high >> 4 | middle >> 2 & 48], axis=-1)
    return _times(blocks["scale"], scales), -_times(blocks["minimum"], minima)


def _times(scale: NDArray[Any], scales: NDArray[Any]) -> NDArray[np.float32]:
    """A block's scale times those of its groups, (blocks x groups,)."""
    import numpy as np

    with np.errstate(invalid="ignore"):
        result: NDArray[np.float32] = (_float(scale)[:, None] * _float(scales)).ravel()
    return result


def _crumbs(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(..., n) bytes as (..., 4, n): 2 bits each, the lowest first."""
    import numpy as np

    return np.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], axis=-2)


def _bits(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(..., n) bytes as (..., 8, n): one bit each, the lowest first."""
    import numpy as np

    return np.stack([packed >> shift & 1 for shift in range(8)], axis=-2)


def _q2_k(blocks: NDArray[Any]) -> Decoded:
    codes = _crumbs(blocks["crumbs"].reshape(-1, 2, 32)).reshape(-1, 16)
    scales = _times(blocks["scale"], blocks["scales"] & 15)
    return Decoded(_signed(codes, 0), scales, -_times(blocks["minimum"], blocks["scales"] >> 4))


def _q3_k(blocks: NDArray[Any]) -> Decoded:
    import numpy as np

    low, high = blocks["scales"][:, :8], blocks["scales"][:, 8:]
    scales = _halves(low).reshape(-1, 16) | _crumbs(high).reshape(-1, 16) << 4
    codes = _crumbs(blocks["crumbs"].reshape(-1, 2, 32)).reshape(-1, 8, 32)
    codes |= _bits(blocks["bits"]) << np.uint8(2)
    return Decoded(
        _signed(codes.reshape(-1, 16), 4), _times(blocks["scale"], scales.view(np.int8) - np.int8(32))
    )


def _q4_k(blocks: NDArray[Any]) -> Decoded:
    codes = _halves(blocks["nibbles"].reshape(-1, 4, 32)).reshape(-1, 32)
    return Decoded(_signed(codes, 0), *_scales_and_minima(blocks))


def _q5_k(blocks: NDArray[Any]) -> Decoded:
    import numpy as np

    codes = _halves(blocks["nibbles"].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    codes |= _bits(blocks["bits"]) << np.uint8(4)
    return Decoded(_signed(codes.reshape(-1, 32), 0), *_scales_and_minima(blocks))


def _q6_k(blocks: NDArray[Any]) -> Decoded:
    import numpy as np

    codes = _halves(blocks["nibbles"].reshape(-1, 2, 64)).reshape(-1, 8, 32)
    codes |= _crumbs(blocks["crumbs"].reshape(-1, 2, 32)).reshape(-1, 8, 32) << np.uint8(4)
    return Decoded(_signed(codes.reshape(-1, 16), 32), _times(blocks["scale"], blocks["scales"]))


def _iq4_xs(blocks: NDArray[Any]) -> Decoded:
    import numpy as np

    low = _halves(blocks["scales"]).swapaxes(1, 2).reshape(-1, 8)
    high = blocks["high"][:, None] >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    scales = (low | high.astype(np.uint8) << 4).view(np.int8) - np.int8(32)
    codes = _halves(blocks["nibbles"].reshape(-1, 8, 16)).reshape(-1, 32)
    return Decoded(_table(codes, _IQ4), _times(blocks["scale"], scales))


_SCALE, _MINIMUM = ("scale", "<f2"), ("minimum", "<f2")
_NIBBLES_32, _NIBBLES_256 = ("nibbles", "u1", 16), ("nibbles", "u1", 128)
_SCALES_12 = ("scales", "u1", 12)
KINDS = {
    "Q4_0": Kind(32, (_SCALE, _NIBBLES_32), _q4_0, Encoding.INT4, 8, _Q4_0, _Q4_0),
    "Q4_1": Kind(32, (_SCALE, _MINIMUM, _NIBBLES_32), _q4_1, Encoding.INT6),
    "Q5_0": Kind(32, (_SCALE, ("bits", "u1", 4), _NIBBLES_32), _q5_0, Encoding.INT6, 16),
    "Q5_1": Kind(32, (_SCALE, _MINIMUM, ("bits", "u1", 4), _NIBBLES_32), _q5_1, Encoding.INT6),
    "Q8_0": Kind(32, (_SCALE, ("codes", "i1", 32)), _q8_0, Encoding.INT8, 127),
    "IQ4_NL": Kind(32, (_SCALE, _NIBBLES_32), _iq4_nl, Encoding.INT4, 127, _IQ4, _IQ4_6_BITS, _IQ4_UNIT),
    "MXFP4": Kind(32, (("exponent", "u1"), _NIBBLES_32), _mxfp4, Encoding.INT4, 12, _MXFP4, _MXFP4),
    "Q2_K": Kind(256, (("scales", "u1", 16), ("crumbs", "u1", 64), _SCALE, _MINIMUM), _q2_k, Encoding.INT4),
    "Q3_K": Kind(256, (("bits", "u1", 32), ("crumbs", "u1", 64), _SCALES_12, _SCALE), _q3_k, Encoding.INT4),
    "Q4_K": Kind(256, (_SCALE, _MINIMUM, _SCALES_12, _NIBBLES_256), _q4_k, Encoding.INT6),
    "Q5_K": Kind(256, (_SCALE, _MINIMUM, _SCALES_12, ("bits", "u1", 32), _NIBBLES_256), _q5_k, Encoding.INT6),
    "Q6_K": Kind(256, (_NIBBLES_256, ("crumbs", "u1", 64), ("scales", "i1", 16), _SCALE), _q6_k,
                 Encoding.INT8),
    "IQ4_XS": Kind(256, (_SCALE, ("high", "<u2"), ("scales", "u1", 4), _NIBBLES_256), _iq4_xs, Encoding.INT4,
                   127, _IQ4, _IQ4_6_BITS, _IQ4_UNIT),
}  # fmt: skip
