"""Files of the Hugging Face Hub, by its own client: found, resumed, checked.

huggingface_hub speaks to the Hub: addresses, tokens, mirrors, proxies and the offline mode are its own, by
its own environment variables. Its download of a file starts anew after a kill and compares sizes alone. So
the bytes are taken here, through its session: appended to what an earlier process left, and compared with the
hash that the Hub gives. Whatever goes wrong is a HubError, one line.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..system.files import reason, sync, sync_directory
from ..system.names import Name, is_commit
from .store import PART

if TYPE_CHECKING:
    from httpx2 import Response

Result = TypeVar("Result")
# what is being done; how much of how much, in bytes. In all 0: that is not known
Progress = Callable[[str, int, int], None]

LIBRARIES = ("huggingface_hub", "httpx2", "filelock")
PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before another try; one that brings bytes starts them again
LONGEST = 60.0  # seconds that the Hub may ask to wait
_BUSY = (408, 429, 500, 502, 503, 504)  # statuses after which it may go better
_PIECE = 1 << 20  # bytes hashed at a time


class HubError(ValueError):
    """A model cannot be had from the Hub; the message is one line that says why and what to do."""


class NoRevision(HubError):
    """The Hub has no such revision of the repository, or none any more."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository. digest: its SHA-256, or Git's SHA-1 of a file that Git itself holds."""

    path: str
    size: int
    digest: str


@dataclass(frozen=True)
class Snapshot:
    """A repository at one commit."""

    name: Name
    commit: str
    files: dict[str, RemoteFile]


def check_library() -> None:
    """ImportError, in one line, if the client of the Hub is not installed."""
    missing = [library for library in LIBRARIES if importlib.util.find_spec(library) is None]
    if missing:
        raise ImportError(
            f"a model by its name needs {' and '.join(missing)}: "
            "`pip install '.[hub]'` in the folder of qwen3c installs it"
        )


def look_up(name: Name, revision: str, progress: Progress) -> Snapshot:
    """What a repository holds at a revision."""
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT

    def ask() -> Any:
        return HfApi().model_info(
            name.repository, revision=revision, files_metadata=True, timeout=HF_HUB_DOWNLOAD_TIMEOUT
        )

    progress(f"asking for {name}", 0, 0)
    with explained(name):
        info = _patiently(ask, name, progress)
        if not is_commit(str(info.sha)):
            raise ValueError(f"{info.sha!r} is no commit")
        files = [_remote(sibling) for sibling in info.siblings or ()]
    return Snapshot(name, info.sha, {file.path: file for file in files if file})


def _remote(sibling: Any) -> RemoteFile | None:
    digest = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
    if not isinstance(sibling.size, int) or not isinstance(digest, str):
        return None
    return RemoteFile(sibling.rfilename, sibling.size, digest)


def fetch(
    snapshot: Snapshot, file: RemoteFile, target: Path, arrived: Callable[[int], None], progress: Progress
) -> None:
    """Bring a file to `target`, where it appears once it is whole and its hash is right.

    arrived: told how many of its bytes are here. OSErrors of the disk, and all else, become a HubError.
    """
    part = target.with_name(target.name + PART)
    target.parent.mkdir(parents=True, exist_ok=True)
    if not _reuse(snapshot, file, part):
        for last in (False, True):  # a second time from its start, if what arrived is not what was sent
            _complete(snapshot, file, part, arrived, progress)
            progress(f"checking {file.path}", 0, 0)
            if digest(part, file) == file.digest:
                break
            part.unlink()
            arrived(0)
            if last:
                raise HubError(
                    f"{snapshot.name}: {file.path} arrives damaged, its hash is not the one that the Hub "
                    "names: try again later, or another mirror (HF_ENDPOINT)"
                )
    with _on_disk(part):
        sync(part)
        part.replace(target)
        sync_directory(target.parent)
    arrived(file.size)


def _reuse(snapshot: Snapshot, file: RemoteFile, part: Path) -> bool:
    """Whether the cache of huggingface_hub had the file, which is then at `part`."""
    found = in_library_cache(snapshot.name, file.path, snapshot.commit)
    if found is None or found.stat().st_size != file.size or digest(found, file) != file.digest:
        return False
    copy_of(found, part)
    return True


def in_library_cache(name: Name, path: str, revision: str) -> Path | None:
    """A file of a repository that the user's other programs have downloaded; None if it is not here."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name.repository, path, revision=revision)
    return Path(os.path.realpath(found)) if isinstance(found, str) else None


def in_library_snapshot(name: Name, path: str) -> str | None:
    """The commit that a name meant when the user's other programs downloaded `path` of it; else None."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name.repository, path, revision=name.revision)
    if not isinstance(found, str):
        return None
    commit = Path(found).parents[path.count("/")].name
    return commit if is_commit(commit) else None


def copy_of(source: Path, target: Path) -> None:
    """The same file under another name, or a copy where the disk cannot do that."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        with _on_disk(target):
            shutil.copyfile(source, target)


def digest(path: Path, file: RemoteFile) -> str:
    """The hash of a file, of the kind that the Hub gives for it."""
    by_git = len(file.digest) == 40
    state = hashlib.sha1(b"blob %d\0" % path.stat().st_size) if by_git else hashlib.sha256()
    with open(path, "rb") as data:
        while piece := data.read(_PIECE):
            state.update(piece)
    return state.hexdigest()


# ----------------------------------------------------------------------------
# Bytes


def _complete(
    snapshot: Snapshot, file: RemoteFile, part: Path, arrived: Callable[[int], None], progress: Progress
) -> None:
    """Make `part` as long as the file is, from where it ends."""
    from huggingface_hub import hf_hub_url

    url = hf_hub_url(snapshot.name.repository, file.path, revision=snapshot.commit)
    with _on_disk(part), open(part, "ab") as out:
        if out.tell() > file.size:
            out.truncate(0)

        def size() -> int:
            return os.fstat(out.fileno()).st_size

        def append() -> None:
            with _response(url, size()) as response:
                if (
                    size() and response.status_code != 206
                ):  # the whole of it comes, though the rest was asked for
                    out.truncate(0)
                for piece in response.iter_bytes():
                    if size() + len(piece) > file.size:
                        raise HubError(
                            f"{snapshot.name}: {file.path} is longer than the {file.size} bytes it has"
                        )
                    out.write(piece)
                    out.flush()
                    arrived(size())

        while size() < file.size:
            with explained(snapshot.name):
                before = size()
                _patiently(append, snapshot.name, progress, lambda: size())
                if size() == before:
                    raise HubError(f"{snapshot.name}: {file.path} ends after {before} of {file.size} bytes")
        if file.size == 0:
            arrived(0)


@contextlib.contextmanager
def _response(url: str, start: int) -> Iterator[Response]:
    """The answer to a request for a file from byte `start` on."""
    from huggingface_hub import get_session, hf_raise_for_status
    from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    headers = {**build_hf_headers(library_name="qwen3c"), "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    with get_session().stream("GET", url, headers=headers, timeout=HF_HUB_DOWNLOAD_TIMEOUT) as response:
        hf_raise_for_status(response)
        if response.status_code == 206:
            came = response.headers.get("Content-Range", "")
            if not came.startswith(f"bytes {start}-"):
                raise HubError(f"{url}: bytes from {start} on were asked for, {came or 'others'} came")
        yield response


@contextlib.contextmanager
def _on_disk(path: Path) -> Iterator[None]:
    """Within, an error of the disk names the file, and says what becomes of it."""
    from httpx2 import HTTPError

    try:
        yield
    except OSError as error:
        if isinstance(error, HTTPError):
            raise
        said = f"{error.filename or path}: {reason(error)}"
        raise HubError(f"{said}; what has arrived is kept, the next start goes on") from None


# ----------------------------------------------------------------------------
# What goes wrong


def _patiently(
    call: Callable[[], Result], name: Name, progress: Progress, done: Callable[[], int] = lambda: 0
) -> Result:
    """The result of a call, tried again after a pause where that may help.

    done: how much is done, of a call that goes on from there; a try that did something gives patience anew.
    """
    from httpx2 import HTTPStatusError, TransportError
    from huggingface_hub.errors import HfHubHTTPError

    pauses, before = iter(PAUSES), done()
    while True:
        try:
            return call()
        except (TransportError, HTTPStatusError, HfHubHTTPError) as error:
            status = _status(error)
            if status is not None and status not in _BUSY:
                raise
            if done() > before:
                pauses, before = iter(PAUSES), done()
            pause = next(pauses, None)
            asked = _asked_to_wait(error)
            if pause is None or asked > LONGEST:
                raise
            fault = f"the Hub answers {status}" if status else "the connection failed"
            progress(f"{name}: {fault}, trying again in {max(pause, asked):.0f} s", 0, 0)
            time.sleep(max(pause, asked))


def _status(error: Exception) -> int | None:
    """The status of the answer that is an error; None if there was no answer."""
    response = getattr(error, "response", None)
    return None if response is None else int(response.status_code)


def _asked_to_wait(error: Exception) -> float:
    response = getattr(error, "response", None)
    after = "" if response is None else response.headers.get("Retry-After", "")
    return float(after) if after.isdecimal() and len(after) < 9 else 0.0


@contextlib.contextmanager
def explained(name: Name) -> Iterator[None]:
    """Within, whatever the client of the Hub raises becomes a HubError that says what to do."""
    from httpx2 import HTTPError, InvalidURL, StreamError
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled, RevisionNotFoundError

    try:
        yield
    except HubError:
        raise
    except OfflineModeIsEnabled:
        raise HubError(offline(name)) from None
    except HFValidationError as error:
        raise HubError(f"{name}: {' '.join(str(error).split())}") from None
    except RevisionNotFoundError:
        raise NoRevision(
            f"{name}: has no revision {name.revision}: give a branch, a tag or a commit, or none for main"
        ) from None
    except (HTTPError, InvalidURL, StreamError) as error:
        raise HubError(f"{name}: {_what_to_do(name, error)}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise HubError(
            f"{name}: {_host()} does not answer as the Hub does ({' '.join(str(error).split())[:80]}): "
            "is HF_ENDPOINT right, or a proxy in between?"
        ) from None


def offline(name: Name) -> str:
    """What is said of a model that is not here while the client of the Hub may not ask for it."""
    return f"{name}: is not in the cache, and HF_HUB_OFFLINE is set: unset it once to fetch the model"


def _what_to_do(name: Name, error: Exception) -> str:
    from huggingface_hub.errors import (
        DisabledRepoError,
        EntryNotFoundError,
        GatedRepoError,
        RepositoryNotFoundError,
    )

    status = _status(error)
    log_in = "log in (`hf auth login`, or HF_TOKEN)"
    if isinstance(error, GatedRepoError):
        return f"is gated: ask for access on {_host()}/{name.repository}, then {log_in}"
    if isinstance(error, DisabledRepoError):
        return "was disabled by the Hub: take another repository of the model"
    if isinstance(error, EntryNotFoundError):
        return "a file that the Hub listed is not there: try again"
    if isinstance(error, RepositoryNotFoundError) or status == 404:
        return f"no such file here, and no such model on {_host()}; if it is private, {log_in}"
    if status == 401:
        return f"the token is not accepted: {log_in} anew, or unset HF_TOKEN for a public model"
    if status == 403:
        return f"the token may not read it: use one with read access, or {log_in} as somebody who may"
    if status == 429:
        wait = _asked_to_wait(error)
        when = f"{wait:.0f} s" if wait else "some minutes"
        return f"too many requests, says the Hub: try again in {when}{_KEPT}"
    if status is not None:
        return f"{_host()} answers with error {status}: try again later{_KEPT}"
    return f"{_host()} cannot be reached ({_cause(error)}): is there a network?{_KEPT}"


_KEPT = "; what has arrived is kept"


def _cause(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


def _host() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT.rpartition("@")[2]
