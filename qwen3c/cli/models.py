"""-m models: what is kept of the Hub, what each model needs, and how to be rid of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..hub import store
from ..memory import available, default_context, gib, table
from ..system import terminal
from ..system.names import Name, parse


def list_models(given: str, as_json: bool) -> int:
    """Each model with its size and the memory it takes, and what was downloaded; on stdout."""
    kept = _chosen(given)
    described = [model for one in kept for model in _models(one)]
    if as_json:
        print(json.dumps({"folder": str(store.root()), "models": described}))
        return 0
    free = available()
    for model in described:
        print(*_lines(model, free), sep="\n")
    total = sum(_size([*one.models, *one.sources, *one.parts]) for one in kept)
    needless = sum(_size(store.needless(one)) for one in kept)
    spare = f"; {gib(needless)} of them are not needed, --prune frees them" if needless else ""
    terminal.note(f"{store.root()}: {gib(total)}{spare}" if kept else f"{store.root()}: no models")
    return 0


def _chosen(given: str) -> list[store.Kept]:
    """What is kept, of one repository if a name is given. ValueError if nothing is kept of it."""
    kept = store.inventory()
    if not given:
        return kept
    name = _name(given)
    chosen = [one for one in kept if one.repository == name.repository]
    if not chosen:
        there = ", ".join(sorted({one.repository for one in kept})) or "no models"
        raise ValueError(f"{given}: is not in {store.root()}, which has {there}")
    return chosen


def _name(given: str) -> Name:
    name = parse(given)
    if name is None:
        raise ValueError(f"{given}: is not the name of a model on the Hub, such as Qwen/Qwen3-0.6B")
    return name


def _models(kept: store.Kept) -> Iterator[dict[str, Any]]:
    """The converted models of a commit, then its downloads if nothing of it is converted."""
    common = {"commit": kept.commit, "revisions": list(kept.revisions)}
    downloads = {"downloaded_bytes": _size(kept.sources), "begun_bytes": _size(kept.parts)}
    for path in kept.models:
        yield {"name": kept.name_of(path), "bits": kept.bits_of(path), **common, **_needs(path), **downloads}
    if not kept.models:
        yield {"name": kept.name_of(Path()), "bits": None, **common, **downloads}


def _needs(path: Path) -> dict[str, Any]:
    """The size of a model file, and the memory it takes at the context that a chat would have."""
    from ..format import ModelFile, ModelFileError

    found: dict[str, Any] = {"path": str(path), "file_bytes": path.stat().st_size}
    try:
        file = ModelFile(path)
    except ModelFileError as error:
        return found | {"damaged": str(error)}
    context = default_context(file.config, "f16")
    rows = table(file.config, file.file_size, len(file.tokenizer))
    resident = rows[-1]["resident_f16_bytes"] - (
        file.config.context - context
    ) * file.config.kv_bytes_per_token("f16")
    return found | {
        "context": file.config.context, "default_context": context, "resident_bytes": resident,
    }  # fmt: skip


def _lines(model: dict[str, Any], free: int | None) -> Iterator[str]:
    bits = f"  {model['bits']} bits" if model["bits"] else ""
    yield f"{terminal.escaped(model['name'])}{bits}  {model['commit'][:8]}"
    if "damaged" in model:
        yield f"    damaged, --prune with its name deletes it: {terminal.escaped(model['damaged'])}"
    elif "path" in model:
        fits = "" if free is None or model["resident_bytes"] <= free else ", more than is free"
        context, longest = model["default_context"], model["context"]
        needs = f"memory {gib(model['resident_bytes'])} at context {context} of {longest}{fits}"
        yield f"    file {gib(model['file_bytes'])}, {needs}"
    if model["downloaded_bytes"]:
        yield f"    downloaded {gib(model['downloaded_bytes'])}" + ", not converted yet" * (
            "path" not in model
        )
    if model["begun_bytes"]:
        yield f"    begun {gib(model['begun_bytes'])}: the next start goes on"


def prune_models(given: str, consent: bool) -> int:
    """Delete what is not needed, or all of one model, once a person agrees."""
    kept = _chosen(given)
    plan = [(one, _all(one) if given else store.needless(one)) for one in kept]
    plan = [(one, paths) for one, paths in plan if paths]
    if not plan:
        terminal.note(f"{store.root()}: everything in it is needed; -m models --prune NAME deletes a model")
        return 0
    for one, paths in plan:
        what = "all of it" if len(paths) == len(_all(one)) else "what was downloaded"
        terminal.note(f"{one.repository} {one.commit[:8]}: {what}, {gib(_size(paths))}")
    freed = 0
    if not consent and not _agreed(sum(_size(paths) for _, paths in plan)):
        terminal.note("nothing was deleted")
        return 0
    for one, paths in plan:
        with store.locked(one.folder.parent) as free:
            if not free:
                terminal.note(f"{one.repository}: another process is fetching it; nothing of it was deleted")
                continue
            freed += _size(paths)
            store.remove(one, paths)
    terminal.note(f"{gib(freed)} are free again")
    return 0


def _agreed(size: int) -> bool:
    """Whether a person says yes. ValueError where nobody can be asked."""
    if not sys.stdin.isatty() or not sys.stderr.isatty():
        raise ValueError("--prune asks before it deletes, and nobody is at a terminal: --yes says it")
    print(f"delete {gib(size)}? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _all(kept: store.Kept) -> list[Path]:
    return [*kept.models, *kept.sources, *kept.parts]


def _size(paths: list[Path] | tuple[Path, ...]) -> int:
    return sum(path.stat().st_size for path in paths if path.exists())
