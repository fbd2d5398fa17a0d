"""A PEFT adapter, checked and merged into a checkpoint while it streams.

    adapter_config.json        -> what is adapted, and by which factor
    adapter_model.safetensors  -> A and B of each adapted matrix

    W' = W + s B A,  s = alpha / r, or alpha / sqrt(r) (rsLoRA)       Hu et al. 2021; Kalajdzievski 2023

as peft's merge_and_unload computes it, in float32: W (rows, columns), A (r, columns), B (rows, r). A key by
which peft would compute anything else is refused by name. Nothing is kept in memory: rows of B and A are read
together with those of W.

transformers 5 holds the experts of a layer in two parameters, (n_experts, rows, columns), which peft adapts
as target_parameters: A (n_experts r, columns) has r rows for each expert, B (rows, r n_experts) every
n_experts-th column.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .directory import Directory, open_safetensors
from .source import Keys, SourceError, StoredTensor, check_dtype, cut, shown, to_float32

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .huggingface import Checkpoint

CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_EXPERT = re.compile(r"(.*\.experts)\.\d+\.(gate|up|down)_proj\.weight")  # a tensor of the checkpoint
_FUSED = re.compile(r".*\.experts\.(gate_up|down)_proj")  # a parameter in transformers

# Keys that merge() uses, and keys that concern only training or origin. All others must be empty.
_HONOURED = {
    *(
        "peft_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "bias",
    ),
    *("exclude_modules", "layers_to_transform", "init_lora_weights"),
    "target_parameters",
    "fan_in_fan_out",  # peft ignores it for Linear layers, and all supported models have those
}
_WITHOUT_EFFECT = {
    *(
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "lora_dropout",
        "peft_version",
        "revision",
    ),
    *("task_type", "megatron_core", "qalora_group_size", "runtime_config", "loftq_config", "eva_config"),
    *("corda_config", "lora_ga_config", "ensure_weight_tying"),
}
# Other initialisations (PiSSA, OLoRA, CorDA, LoftQ, ...) change the base weights as well
_INITIALISATIONS = (True, False, "gaussian", "eva", "orthogonal")


def merge(checkpoint: Checkpoint, adapter: Directory) -> None:
    """Make the tensors of `checkpoint` that the adapter changes deliver the changed weights.

    Raises SourceError, before any weight is read, if the adapter is damaged, is no plain LoRA, or was trained
    on a model of another shape.
    """
    keys = adapter.keys(CONFIG_NAME)
    _check_keys(keys)
    pairs = _pairs(adapter)
    parameters = _parameters(keys, checkpoint)
    for parameter, place in _places(parameters).items():
        if place not in pairs:
            fault = f"has no tensors for {parameter}, which target_parameters names"
            raise SourceError(f"{keys.path}: {fault}: made for another base model?")
        _adapt(keys, checkpoint, parameter, parameters[parameter], *pairs.pop(place))
    _check_targets(keys, pairs, checkpoint)
    for module, (a, b) in pairs.items():
        name = f"{module}.weight"
        base = checkpoint.tensors.get(name)
        if module == "lm_head" and checkpoint.config.tied_embedding:
            raise SourceError(f"{a.path}: adapts lm_head, which in this base is the embedding as well")
        if base is None or len(base.shape) != 2 or module == "model.embed_tokens":
            raise SourceError(f"{a.path}: {shown(module)} is not a linear layer of the base model")
        _adapt(keys, checkpoint, module, [name], a, b)
    kept = {key: keys.values[key] for key in sorted(_HONOURED & keys.values.keys())}
    checkpoint.metadata["source"]["lora"] = kept


def _adapt(
    keys: Keys, checkpoint: Checkpoint, target: str, names: list[str], a: StoredTensor, b: StoredTensor
) -> None:
    """Merge A and B into the tensors that make up `target`, expert by expert, in the order of the rows."""
    first = checkpoint.tensors[names[0]]
    n_experts = checkpoint.config.n_experts if _FUSED.fullmatch(target) else 1
    n_parts = len(names) // n_experts
    rows, columns = first.shape
    rank = _rank(keys, target)
    _check_shapes(a, b, (n_experts * rank, columns), (n_parts * rows, rank * n_experts))
    for i, name in enumerate(names):
        expert, part = divmod(i, n_parts)
        base = checkpoint.tensors[name]
        fields = {field.name: getattr(base, field.name) for field in dataclasses.fields(StoredTensor)}
        fields |= {"name": f"{base.name} + LoRA", "dtype": "F32"}
        checkpoint.tensors[name] = MergedTensor(
            **fields,
            base=base,
            a=_slice(a, expert * rank, rank),
            b=_slice(b, part * rows, rows),
            b_columns=slice(expert, None, n_experts),
            scale=_scale(keys, target, rank),
        )


@dataclass(frozen=True)
class MergedTensor(StoredTensor):
    """base + scale x b a, in float32."""

    base: StoredTensor
    a: StoredTensor  # (r, columns)
    b: StoredTensor  # (rows, r n_experts)
    b_columns: slice  # of b, r of them
    scale: float

    def read(self, start: int, out: memoryview) -> None:
        """Fill `out` with whole rows from byte `start` on.

        The product is summed in float64 and rounded once, so the order in which a BLAS adds does not show.
        """
        import numpy as np

        row_size = 4 * self.shape[1]
        first, n = start // row_size, len(out) // row_size
        # quantising refuses values that are not finite, and says where they are
        with np.errstate(all="ignore"):
            a, b = _rows(self.a, 0, self.a.shape[0]), _rows(self.b, first, n)[:, self.b_columns]
            delta = self.scale * (b.astype(np.float64) @ a.astype(np.float64))
            merged = _rows(self.base, first, n) + delta.astype(np.float32)
        np.frombuffer(out, "<f4")[:] = merged.ravel()


def _slice(tensor: StoredTensor, first: int, n: int) -> StoredTensor:
    """Rows `first` to `first + n` of a matrix, as a tensor."""
    row_size = tensor.size // tensor.shape[0]
    return dataclasses.replace(tensor, shape=(n, tensor.shape[1]), offset=tensor.offset + first * row_size)


def _rows(tensor: StoredTensor, first: int, n: int) -> NDArray[np.float32]:
    """Rows `first` to `first + n` of a matrix, (n, columns)."""
    row_size = tensor.size // tensor.shape[0]
    data = memoryview(bytearray(n * row_size))
    tensor.read(first * row_size, data)
    return to_float32(data, tensor.dtype).reshape(n, -1)


def _check_keys(keys: Keys) -> None:
    """Refuse every key that would make peft's merge differ from the formula above."""
    kind = keys.require("peft_type")
    if kind != "LORA":
        raise SourceError(f"{keys.path}: peft_type is {shown(kind)}, supported: 'LORA'")
    for key, value in keys.values.items():
        if key not in _HONOURED | _WITHOUT_EFFECT and value not in (None, False, [], {}, ""):
            raise SourceError(f"{keys.path}: {cut(key)} is {shown(value)}, which is not supported")
    if keys.values.get("bias", "none") != "none":
        raise SourceError(f"{keys.path}: bias is {shown(keys.values['bias'])}, supported: 'none'")
    start = keys.values.get("init_lora_weights", True)
    if start not in _INITIALISATIONS:
        raise SourceError(
            f"{keys.path}: init_lora_weights is {shown(start)}, which changes the base weights too; "
            "convert it to plain LoRA with peft first"
        )
    if keys.integer("r") < 1:
        raise SourceError(f"{keys.path}: r is {shown(keys.values['r'])}, at least 1 is needed")
    keys.number("lora_alpha")


def _pairs(adapter: Directory) -> dict[str, tuple[StoredTensor, StoredTensor]]:
    """Module -> its (A, B). SourceError for a tensor that is neither."""
    path = adapter.path(TENSORS_NAME)
    if not adapter.exists(TENSORS_NAME):
        pickle = adapter.exists("adapter_model.bin")
        hint = " (adapter_model.bin is never opened: only safetensors are read)" if pickle else ""
        raise SourceError(f"{path}: no such file{hint}")
    halves: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in open_safetensors(adapter, TENSORS_NAME).items():
        known = re.fullmatch(re.escape(_PREFIX) + r"(.+)\.lora_([AB])\.weight", name)
        if not known:
            hints = {"lora_magnitude": ": DoRA is not supported"}
            hints |= {"base_layer": " of the base: save the adapter with save_embedding_layers=False"}
            hint = next((hint for part, hint in hints.items() if part in name), "")
            raise SourceError(f"{path}: unexpected tensor {shown(name)}{hint}")
        check_dtype(tensor)
        if len(tensor.shape) != 2 or not all(tensor.shape):
            raise SourceError(f"{path}: {shown(name)} has shape {list(tensor.shape)}, expected a matrix")
        halves.setdefault(known[1], {})[known[2]] = tensor
    for module, half in halves.items():
        if len(half) != 2:
            missing = "B" if "A" in half else "A"
            raise SourceError(f"{path}: {shown(module)} has no tensor lora_{missing}.weight")
    if not halves:
        raise SourceError(f"{path}: has no tensors")
    return {module: (half["A"], half["B"]) for module, half in halves.items()}


def _parameters(keys: Keys, checkpoint: Checkpoint) -> dict[str, list[str]]:
    """Each parameter of transformers that target_parameters names -> the checkpoint's tensors in it, in
    order.
    """
    targets = keys.values.get("target_parameters") or []
    if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
        raise SourceError(f"{keys.path}: target_parameters is {shown(targets)}, expected a list of names")
    parameters: dict[str, list[str]] = {}
    for name, tensor in checkpoint.tensors.items():
        expert = _EXPERT.fullmatch(name)
        parameter = f"{expert[1]}.{'down' if expert[2] == 'down' else 'gate_up'}_proj" if expert else name
        named = any(parameter == target or parameter.endswith(f".{target}") for target in targets)
        if named and len(tensor.shape) == 2:
            parameters.setdefault(parameter, []).append(name)
    return parameters


def _places(parameters: Iterable[str]) -> dict[str, str]:
    """Parameter -> where peft stores its A and B.

    peft wraps the module once per parameter: each earlier one lies one `.base_layer` deeper.
    """
    modules: dict[str, list[str]] = {}
    for parameter in parameters:
        modules.setdefault(parameter.rpartition(".")[0], []).append(parameter)
    return {
        parameter: module + ".base_layer" * depth
        for module, inside in modules.items()
        for depth, parameter in enumerate(reversed(inside))
    }


def _check_targets(keys: Keys, pairs: dict[str, Any], checkpoint: Checkpoint) -> None:
    """Raise SourceError unless the adapter has every matrix that target_modules names in this base.

    This also finds an adapter for another number of layers. A target_modules that is text is a regular
    expression; then nothing is checked, and the adapter's tensors say what it changes.
    """
    targets = keys.require("target_modules")
    if targets is None and keys.values.get("target_parameters"):
        targets = []
    if isinstance(targets, str):
        return
    excluded = keys.values.get("exclude_modules") or []
    for key, value in (("target_modules", targets), ("exclude_modules", excluded)):
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise SourceError(f"{keys.path}: {key} is {shown(value)}, expected a list of names")
    layers = keys.values.get("layers_to_transform")
    layers = [layers] if type(layers) is int else layers or []
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        raise SourceError(f"{keys.path}: layers_to_transform is {shown(layers)}, expected a list of integers")

    def named(module: str, names: list[str]) -> bool:
        return any(module == name or module.endswith(f".{name}") for name in names)

    # in transformers 5 experts are parameters, not modules: target_modules then adapts none of them
    fused = not any(".experts." in module for module in pairs)
    for name, tensor in checkpoint.tensors.items():
        module = name.removesuffix(".weight")
        layer = re.match(r"model\.layers\.(\d+)\.", module)
        chosen = not layers or (layer is not None and int(layer[1]) in layers)
        wanted = len(tensor.shape) == 2 and named(module, targets) and not named(module, excluded) and chosen
        absent = fused and ".experts." in module
        if wanted and module not in pairs and not absent:
            fault = f"has no tensors for {module}, which target_modules names: made for another base model?"
            raise SourceError(f"{keys.path}: {fault}")
        if module in pairs and not wanted:
            raise SourceError(f"{keys.path}: target_modules does not name {module}, but the adapter has it")


def _check_shapes(
    a: StoredTensor, b: StoredTensor, a_shape: tuple[int, int], b_shape: tuple[int, int]
) -> None:
    """Raise SourceError unless A and B fit the base and have the rank that adapter_config.json states."""
    for tensor, expected in ((a, a_shape), (b, b_shape)):
        if tensor.shape != expected:
            found = f"{cut(tensor.name)} has shape {shown([*tensor.shape])}, expected {shown([*expected])}"
            raise SourceError(f"{tensor.path}: {found}: made for another base model?")


def _rank(keys: Keys, target: str) -> int:
    rank = _of_pattern(keys, "rank_pattern", target)
    return keys.integer("r") if rank is None else int(rank)


def _scale(keys: Keys, target: str, rank: int) -> float:
    alpha = _of_pattern(keys, "alpha_pattern", target)
    alpha = keys.number("lora_alpha") if alpha is None else alpha
    rslora = "use_rslora" in keys.values and keys.flag("use_rslora")
    return alpha / (math.sqrt(rank) if rslora else rank)


def _of_pattern(keys: Keys, key: str, target: str) -> Any:
    """The value of the first pattern of `key` that matches the end of the target's name; None if none does.

    The patterns are regular expressions. Those with groups or many repetitions are refused: they could run
    forever.
    """
    patterns = keys.values.get(key) or {}
    if not isinstance(patterns, dict):
        raise SourceError(f"{keys.path}: {key} is {shown(patterns)}, expected an object")
    for pattern, value in patterns.items():
        simple = re.fullmatch(r"\^?[\w.*+-]*(\\[.d][\w.*+-]*)*\$?", pattern)
        if not simple or pattern.count("*") + pattern.count("+") > 2 or len(pattern) > 200:
            raise SourceError(f"{keys.path}: {key}: pattern {shown(pattern)} is not supported")
        try:
            found = re.match(rf"(.*\.)?({pattern})$", target)
        except re.error as error:
            raise SourceError(f"{keys.path}: {key}: pattern {shown(pattern)}: {cut(error)}") from None
        if found:
            name = f"{key}[{shown(pattern)}]"
            nested = Keys(keys.path, {name: value})
            return nested.integer(name) if key == "rank_pattern" else nested.number(name)
    return None
