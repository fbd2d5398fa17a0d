"""A name on the Hub -> a model.bin in the cache: from there, else downloaded and converted, once.

    config.json     first, so that what cannot be converted is refused before the weights come
    disk            what is missing of the download, and the converted file, must fit
    the rest        only what the exporter reads: texts, safetensors; or one GGUF file. No pickle, no Python
    convert         into the cache, as export.py does

Each step leaves whole files; the next start, or another process that waited, goes on behind the last one.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from ..memory import gib
from ..system.files import reason
from ..system.names import Name
from . import download, store
from .download import HubError, Progress, RemoteFile, Snapshot

if TYPE_CHECKING:
    from ..convert.recipe import Recipe

# Sizes of a converted file as shares of its source, rounded up: INT8 of 16 bits and of Q8_0
_OF_SAFETENSORS, _OF_GGUF = 9 / 16, 9 / 8
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")
# of repositories of numbers that are quantised already, behind the name of the one to take instead
_QUANTISED = re.compile(
    r"[-_.](?:fp8|awq|gptq|int[48]|bnb|[48]bit|w[48]a(?:8|16)|nvfp4|mxfp4|mlx)\b.*", re.IGNORECASE
)


def ignore(doing: str, done: int, total: int) -> None:
    """A Progress that says nothing."""


def model(name: Name, bits: str = store.BITS, progress: Progress = ignore) -> Path:
    """The model.bin of a name; fetched and converted if it is not in the cache.

    bits: as --bits of export.py has them. HubError, SourceError or OSError if it cannot be had.
    """
    found = store.find(name, bits)
    if found:
        return found
    from ..convert import recipe

    chosen = None if bits == store.BITS else recipe.of_bits(bits)
    with _alone(name, progress):
        found = store.find(name, bits)
        if found:
            return found
        place = store.Place(name)
        commit, source = _source(place, progress, converting=True)
        return _convert(place, commit, bits, chosen, source, progress)


def source(name: Name, progress: Progress = ignore) -> Path:
    """What the exporter is given for a name, a directory or a GGUF file; fetched if it is not here."""
    place = store.Place(name)
    commit = place.commit()
    whole = place.whole_source(commit) if commit else None
    if whole:
        return whole
    with _alone(name, progress):
        return _source(place, progress, converting=False)[1]


def own_name(name: Name) -> str | None:
    """What a model of the Hub calls itself: as its repository; a GGUF file says its name itself, so None."""
    return None if name.file else name.own


def _alone(name: Name, progress: Progress) -> contextlib.AbstractContextManager[bool]:
    download.check_library()
    folder = store.Place(name).folder
    return store.locked(folder, lambda: progress(f"another process is fetching {name.repository}", 0, 0))


def _convert(
    place: store.Place, commit: str, bits: str, chosen: Recipe | None, source: Path, progress: Progress
) -> Path:
    from ..convert.export import export
    from ..convert.source import SourceError

    target = place.model(commit, bits)

    def converted(done: int, total: int) -> None:
        progress(f"converting {place.name} to {bits} bits", done, total)

    try:
        export(source, target, recipe=chosen, name=own_name(place.name), progress=converted)
    except SourceError as error:
        # the next start compares with the Hub again
        (place.source(commit) / store.COMPLETE).unlink(missing_ok=True)
        raise HubError(_of(place, commit, error)) from None
    except OSError as error:
        raise HubError(f"{error.filename or target}: {reason(error)}") from None
    return target


# ----------------------------------------------------------------------------
# The source


def _source(place: store.Place, progress: Progress, *, converting: bool) -> tuple[str, Path]:
    """The commit of a name and its source, once all of it is there."""
    commit = place.commit()
    whole = place.whole_source(commit) if commit else None
    if commit and whole:
        return commit, whole
    from huggingface_hub import is_offline_mode

    if is_offline_mode():
        commit = _from_library_cache(place)
    else:
        snapshot = _snapshot(place, progress)
        commit = snapshot.commit
        _fetch_all(place, snapshot, progress, converting)
    whole = place.whole_source(commit)
    assert whole is not None
    return commit, whole


def _snapshot(place: store.Place, progress: Progress) -> Snapshot:
    """The repository at the commit that an earlier start had begun with, else at what its revision is now."""
    name, begun = place.name, place.commit()
    if begun and begun != name.revision:
        try:
            return download.look_up(name, begun, progress)
        except download.NoRevision:
            place.forget()
    return download.look_up(name, name.revision, progress)


def _fetch_all(place: store.Place, snapshot: Snapshot, progress: Progress, converting: bool) -> None:
    folder = place.source(snapshot.commit)
    if place.name.file:
        _fetch_files(place, snapshot, [_gguf(snapshot)], progress, converting)
        return
    _check_listing(snapshot)
    get = _Getter(snapshot, folder, progress)
    get("config.json")
    _check_config(place, snapshot.commit)
    from ..convert.directory import INDEX_NAME, OPTIONAL, REQUIRED, SINGLE_NAME, Directory, shards
    from ..convert.source import SourceError

    for path in (*REQUIRED, *OPTIONAL, *([] if SINGLE_NAME in snapshot.files else [INDEX_NAME])):
        if path in snapshot.files:
            get(path)
    if SINGLE_NAME in snapshot.files:
        weights = [SINGLE_NAME]
    else:
        try:
            with Directory(folder) as files:
                weights = sorted(shards(files))
        except SourceError as error:
            raise HubError(_of(place, snapshot.commit, error)) from None
    absent = [path for path in weights if path not in snapshot.files]
    if absent:
        raise HubError(f"{place.name}: {absent[0]} is missing there, though {INDEX_NAME} names it")
    _fetch_files(place, snapshot, [snapshot.files[path] for path in weights], progress, converting)
    (folder / store.COMPLETE).touch()


class _Getter:
    """Small files of a snapshot, one after the other, into a folder; those that are there are kept."""

    def __init__(self, snapshot: Snapshot, folder: Path, progress: Progress) -> None:
        self._snapshot, self._folder, self._progress = snapshot, folder, progress

    def __call__(self, path: str) -> None:
        file, target = self._snapshot.files[path], self._folder / path
        if not target.is_file():
            self._progress(f"fetching {path}", 0, 0)
            download.fetch(self._snapshot, file, target, lambda n: None, self._progress)


def _fetch_files(
    place: store.Place, snapshot: Snapshot, files: list[RemoteFile], progress: Progress, converting: bool
) -> None:
    """Bring the weights, with one account of all their bytes."""
    folder = place.source(snapshot.commit)
    total = sum(file.size for file in files)
    here = {file.path: _here(folder / file.path) for file in files}
    _check_space(place, total - sum(here.values()), total if converting else 0)
    place.remember(snapshot.commit)
    for file in files:
        if (folder / file.path).is_file():
            continue

        def arrived(n: int, path: str = file.path) -> None:
            here[path] = n
            progress(f"fetching {place.name}", sum(here.values()), total)

        arrived(here[file.path])
        download.fetch(snapshot, file, folder / file.path, arrived, progress)


def _here(target: Path) -> int:
    """Bytes of a file that have arrived."""
    for path in (target, target.with_name(target.name + store.PART)):
        if path.is_file():
            return path.stat().st_size
    return 0


def _from_library_cache(place: store.Place) -> str:
    """Without a network: the commit that other programs have downloaded whole; its files are linked."""
    from ..convert.directory import INDEX_NAME, OPTIONAL, REQUIRED, SINGLE_NAME, Directory, shards

    name = place.name
    offline = HubError(download.offline(name))
    first = download.in_library_snapshot(name, name.file or "config.json")
    if first is None:
        raise offline
    commit, folder = first, place.source(first)

    def take(path: str, needed: bool = True) -> None:
        found = download.in_library_cache(name, path, commit)
        if found is None and needed:
            raise offline
        if found is not None:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            download.copy_of(found, folder / path)

    if name.file:
        take(name.file)
    else:
        for path in (*REQUIRED, *OPTIONAL, SINGLE_NAME, INDEX_NAME):
            take(path, needed=path in REQUIRED)
        if not (folder / SINGLE_NAME).exists():
            if not (folder / INDEX_NAME).exists():
                raise offline
            with Directory(folder) as files:
                weights = sorted(shards(files))
            for path in weights:
                take(path)
        (folder / store.COMPLETE).touch()
    place.remember(commit)
    return commit


# ----------------------------------------------------------------------------
# What cannot work, and what to take instead


def _check_listing(snapshot: Snapshot) -> None:
    """HubError if no safetensors model is there, and what is."""
    from ..convert.directory import INDEX_NAME, REQUIRED, SINGLE_NAME

    name, files = snapshot.name, snapshot.files
    if "config.json" not in files and "adapter_config.json" in files:
        raise HubError(
            f"{name}: is a LoRA adapter: fetch its base model, and merge it by export.py --lora DIR"
        )
    if SINGLE_NAME not in files and INDEX_NAME not in files:
        ggufs = _ggufs(snapshot)
        if ggufs:
            raise HubError(f"{name}: has GGUF files alone: name one, such as {_with_file(name, ggufs[0])}")
        pickles = [path for path in files if path.endswith(_PICKLES)]
        if pickles:
            raise HubError(
                f"{name}: has no safetensors but {pickles[0]}, which is never opened: "
                "take a repository of the model with safetensors, or a GGUF file"
            )
        raise HubError(
            f"{name}: has neither {SINGLE_NAME} nor {INDEX_NAME}: it is no language model in safetensors"
        )
    for path in REQUIRED:
        if path not in files:
            raise HubError(
                f"{name}: has no {path}: take a repository of the model that transformers can load"
            )


def _check_config(place: store.Place, commit: str) -> None:
    """HubError if config.json says what the exporter refuses; it is not kept then."""
    from ..convert.directory import Directory
    from ..convert.huggingface import supported_architecture
    from ..convert.source import SourceError

    folder = place.source(commit)
    try:
        with Directory(folder) as files:
            supported_architecture(files.config())
    except SourceError as error:
        said = _of(place, commit, error)
        (folder / "config.json").unlink()
        for empty in (folder, folder.parent, place.folder):
            with contextlib.suppress(OSError):
                empty.rmdir()
        raise HubError(said) from None


def _gguf(snapshot: Snapshot) -> RemoteFile:
    """The GGUF file of a name. HubError if it is not there, or a part of one."""
    name = snapshot.name
    if re.search(r"-\d{5}-of-\d{5}\.gguf$", name.file):
        raise HubError(f"{name}: is one of several parts; take a file that is whole, or the safetensors")
    if name.file not in snapshot.files:
        ggufs = _ggufs(snapshot)
        there = (
            f"there are {', '.join(ggufs[:6])}" + ", ..." * (len(ggufs) > 6)
            if ggufs
            else "it has no GGUF file"
        )
        raise HubError(f"{name.repository}: has no {name.file}; {there}")
    return snapshot.files[name.file]


def _ggufs(snapshot: Snapshot) -> list[str]:
    """The whole GGUF files of a repository, those of Q8_0 first."""
    found = [path for path in snapshot.files if path.endswith(".gguf") and not re.search(r"-of-\d{5}", path)]
    return sorted(found, key=lambda path: ("q8_0" not in path.lower(), path))


def _with_file(name: Name, file: str) -> str:
    return str(Name(name.repository, name.revision, file))


def _of(place: store.Place, commit: str, error: Exception) -> str:
    """What is wrong with a source, by the name that a person typed; and what to take of a quantised model."""
    from ..convert.source import TAKE_UNQUANTIZED

    folder = place.source(commit)
    said = str(error).replace(f"{folder}/", "").replace(str(folder), str(place.name))
    original = _QUANTISED.sub("", place.name.repository)
    if TAKE_UNQUANTIZED in said and original != place.name.repository:
        said += f": perhaps {original}"
    return said if said.startswith(str(place.name)) else f"{place.name}: {said}"


def _check_space(place: store.Place, missing: int, converted_from: int) -> None:
    """HubError if the disk of the cache does not hold what is missing and what it is converted into."""
    share = _OF_GGUF if place.name.file else _OF_SAFETENSORS
    needed = missing + int(converted_from * share)
    folder = store.root()
    free = shutil.disk_usage(folder).free
    if needed > free:
        what = f"{gib(missing)} to fetch" + f" and {gib(needed - missing)} converted" * bool(converted_from)
        raise HubError(
            f"{place.name}: needs about {gib(needed)} in {folder} ({what}), {gib(free)} are free: "
            "`run.py -m models --prune` frees what is not needed, QWEN3C_CACHE names another disk"
        )
