from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from nano import environment

from qwen3c import format
from qwen3c.convert.export import export
from qwen3c.training.estimate import estimate
from qwen3c.training.shapes import PRESETS, Shape, new_model
from qwen3c.training.vocabulary import train_bpe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SHAPE = Shape(128, 256, 3, 4, 2, 32, 256)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_bpe(["def f(): pass"], 272)


def test_parameters_file_and_cache_are_what_the_exported_model_has(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = new_model(SHAPE, tokenizer, seed=1)
    e = estimate(model, 2, 64, False)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    export(tmp_path, tmp_path / "model.bin")
    file = format.ModelFile(str(tmp_path / "model.bin"))
    assert e.n_parameters == file.config.n_parameters
    assert e.kv_per_token == file.config.kv_bytes_per_token("f16")
    assert e.file == pytest.approx(file.fields()["tensors_size"], rel=0.01)


def test_presets_span_one_to_twentyfive_million_parameters() -> None:
    tokenizer = train_bpe(["x"], 263)
    vocabulary = 4096 - 272  # the rows a full vocabulary would have more
    sizes = [
        sum(p.numel() for p in new_model(shape, tokenizer, 1).parameters()) + vocabulary * shape.dim
        for shape in PRESETS.values()
    ]
    assert sizes == sorted(sizes)
    assert 0.9e6 < sizes[0] < 1.5e6 and 24e6 < sizes[-1] < 27e6


MEASURE = """
import sys, torch
from nano import *
from qwen3c.training.estimate import estimate
from qwen3c.training.shapes import Shape, new_model
from qwen3c.training.vocabulary import train_bpe

def resident():
    with open("/proc/self/status") as f:
        return next(int(l.split()[1]) * 1024 for l in f if l.startswith("VmRSS"))

def highest():
    with open("/proc/self/status") as f:
        return next(int(l.split()[1]) * 1024 for l in f if l.startswith("VmHWM"))

torch.set_num_threads(1)
dim, layers, micro, context = map(int, sys.argv[1:])
shape = Shape(dim, 3 * dim, layers, dim // 32, dim // 64, 32, context)
tokenizer = train_bpe(["x"], 263)
small = new_model(Shape(32, 32, 1, 1, 1, 32, 32), tokenizer, 1)  # what the first pass of any model loads
ids = torch.zeros((1, 8), dtype=torch.int64)
torch.nn.functional.cross_entropy(small(input_ids=ids).logits[0], ids[0]).backward()
estimate(small, 1, 8, False)
before = resident()
model = new_model(shape, tokenizer, 1)
expected = estimate(model, micro, context, False).peak
optimizer = torch.optim.AdamW(model.parameters())
tokens = torch.zeros((micro, context), dtype=torch.int64)
for _ in range(3):
    logits = model(input_ids=tokens, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    del logits
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(expected, highest() - before)
"""


# (freed tensors go back to the system at once here; by default the C library keeps some, up to a third more)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("arguments", [(256, 6, 8, 256), (768, 4, 1, 64)], ids=["activations", "weights"])
def test_the_peak_of_training_is_within_15_percent_of_what_is_measured(
    tmp_path: Path, arguments: tuple[int, ...]
) -> None:
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, arguments)], cwd=__file__.rpartition("/")[0],
        env=environment() | {"MALLOC_MMAP_THRESHOLD_": "65536"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    expected, measured = map(int, run.stdout.split())
    assert expected == pytest.approx(measured, rel=0.15)
