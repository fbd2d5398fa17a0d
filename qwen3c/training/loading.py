"""A Hugging Face directory -> a model to train, after every check that the exporter makes at the end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..convert.directory import Directory
from ..convert.huggingface import Checkpoint
from ..system import mistakes
from . import TrainingError
from .checkpoint import file_fingerprint, model_files
from .vocabulary import load

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# weights that share a scale; a model whose widths do not fit it cannot be exported at all
SMALLEST_GROUP = 32


def check_exportable(directory: Path) -> None:
    """SourceError, as export.py raises it, for a model that could not be exported after training."""
    if not (directory / "config.json").is_file():
        command = "" if directory.exists() else mistakes.download(str(directory))
        hint = f": `{command}` gets one" if command else ""
        raise TrainingError(f"{directory}: has no config.json; expected a Hugging Face directory{hint}")
    with Directory(directory) as source:
        Checkpoint(source, SMALLEST_GROUP)


def load_model(directory: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A model in float32, every weight of it from the directory, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    check_exportable(directory)
    tokenizer = load(directory)
    factory: Any = AutoModelForCausalLM
    try:
        model, loaded = factory.from_pretrained(
            directory,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # the libraries raise errors of any type
        raise TrainingError(f"{directory}: {' '.join(str(error).split())[:300]}") from None
    for name in sorted(loaded["missing_keys"]):
        raise TrainingError(f"{directory}: tensor {name} is missing: it would begin as random numbers")
    return model, tokenizer


def model_fingerprint(directory: Path) -> str:
    """The fingerprint of the files of a model."""
    return file_fingerprint(model_files(directory))
