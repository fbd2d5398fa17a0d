"""Weights are paged in from the file when needed, and only those of chosen experts.

python -m pytest tests/engine/test_page_cache.py
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from small_models import export_small_model

from qwen3c.engine import Engine
from qwen3c.format import ModelFile, Tensor

MOE: dict[str, Any] = {
    "architecture": "qwen3_moe",
    "n_experts": 16,
    "dim": 128,
    "expert_hidden_dim": 256,
    "n_layers": 3,
}
PAGE = mmap.PAGESIZE


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    model = Engine(str(export_small_model(tmp_path_factory.mktemp("model"), **MOE)), threads=2)
    if not hasattr(os, "posix_fadvise"):
        pytest.skip("this system cannot be told to forget the pages of a file")
    evict(model.file)
    if resident(model.file).any():
        pytest.skip("this file system keeps its files in memory")
    return model


def address(file: ModelFile) -> int:
    return np.frombuffer(file.map, np.uint8).ctypes.data


def evict(file: ModelFile) -> None:
    """Drop every page of the file from this process and the page cache, and turn read-ahead off."""
    file.map.madvise(mmap.MADV_DONTNEED)
    descriptor = os.open(file.path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    file.map.madvise(mmap.MADV_RANDOM)  # no reading ahead


def resident(file: ModelFile) -> NDArray[np.bool_]:
    """Which pages of the file are in memory, (pages,)."""
    pages = np.zeros(-(-len(file.map) // PAGE), np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    assert (
        libc.mincore(
            ctypes.c_void_p(address(file)), ctypes.c_size_t(len(file.map)), ctypes.c_void_p(pages.ctypes.data)
        )
        == 0
    )
    return (pages & 1).astype(bool)


def test_a_file_that_leaves_memory_between_tokens_gives_the_same_bits(model: Engine) -> None:
    ids = np.random.default_rng(2).integers(0, 500, 24)
    expected = model.session().forward(ids, logits="all")
    session, read = model.session(), []
    for id, logits in zip(ids, expected, strict=True):
        evict(model.file)
        assert not resident(model.file).any()
        assert np.array_equal(session.forward([id]), logits)
        read.append(resident(model.file).mean())
    assert min(read) > 0 and max(read) < 0.5


def test_a_token_reads_the_experts_it_chooses_and_no_others(model: Engine) -> None:
    ids = np.random.default_rng(3).integers(0, 500, 10)
    shares = model.trace(ids, "*.gate.shares")
    session = model.session()
    session.forward(ids[:-1])
    evict(model.file)
    session.forward(ids[-1:])
    in_memory = resident(model.file)
    for layer in range(model.config.n_layers):
        chosen = shares[f"model.layers.{layer}.mlp.gate.shares"][-1] > 0
        for expert in range(model.config.n_experts):
            prefix = f"model.layers.{layer}.mlp.experts.{expert}."
            for tensor in model.file.tensors:
                if tensor.name.startswith(prefix):
                    assert (in_memory[inner_pages(model.file, tensor)] == chosen[expert]).all(), tensor.name


def inner_pages(file: ModelFile, tensor: Tensor) -> slice:
    """The pages that hold bytes of this tensor alone."""
    first = np.frombuffer(file.data(tensor), np.uint8).ctypes.data - address(file)
    pages = slice(-(-first // PAGE), (first + tensor.size) // PAGE)
    assert pages.stop - pages.start >= 4
    return pages
