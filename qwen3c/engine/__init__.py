"""The engine: tokens in, logits out.

    forward.pyx    the pass itself, without Python: weights, run state, blocks, forward
    engine.pyx     Engine and Session around it, where arguments are checked
    probes.py      the activations that a pass can leave copies of

Here too: what the kernels offer outside of a pass, such as the choice of the instruction set, and softmax and
top_k for the sampler.
"""

from ..kernels.table import (
    ISA_NAMES,
    OPENMP,
    int8_peak,
    isa,
    log_sum_exp,
    quantize_tiles,
    read_bandwidth,
    runnable_isas,
    set_isa,
    softmax,
    top_k,
)
from .engine import KV, Activations, Engine, Logits, Session, run_state_bytes

__all__ = [
    "ISA_NAMES",
    "KV",
    "OPENMP",
    "Activations",
    "Engine",
    "Logits",
    "Session",
    "int8_peak",
    "isa",
    "log_sum_exp",
    "quantize_tiles",
    "read_bandwidth",
    "run_state_bytes",
    "runnable_isas",
    "set_isa",
    "softmax",
    "top_k",
]
