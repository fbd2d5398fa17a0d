"""The engine: tokens in, logits out.

    forward.pyx    the pass itself, without Python: weights, run state, blocks, forward
    engine.pyx     Engine and Session around it, where arguments are checked
    probes.py      the activations that a pass can leave copies of

What the kernels offer beside a pass is here too: which instruction set they use, and the sums that a sampler needs.
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
