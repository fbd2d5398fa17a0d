"""API keys: a file of them, who a request comes from, and what each may have running.

    # NAME  KEY                      limits of its own
    alice   sk-4f9c...e1
    editor  sk-77aa...02  running=2 queue=8 priority=1

Keys are compared by their SHA-256, all of them each time: how long it takes tells nothing about any of them.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from .ask import KeyLimits
from .errors import ApiError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_KEY = re.compile(r"[\x21-\x7e]+")
_LIMIT = re.compile(r"(running|queue|priority)=(-?\d{1,6})")
MAX_FILE = 1 << 20  # bytes
NO_LIMITS = KeyLimits()


@dataclass(frozen=True)
class Key:
    """Who asks. limits: what it may have at once; priority: lower is sooner.

    `name` is also the namespace of what the prefix cache remembers.
    """

    name: str
    digest: bytes = field(repr=False)
    limits: KeyLimits = NO_LIMITS
    priority: int = 0


ANONYMOUS = Key("", b"")


class Keys:
    """The keys of a file; without a file everybody is ANONYMOUS. limits: of keys whose line gives none."""

    def __init__(self, path: str | os.PathLike[str] | None = None, limits: KeyLimits = NO_LIMITS) -> None:
        """ValueError or OSError, with the file and the line, if the file cannot be used."""
        self.path = None if path is None else Path(path)
        self._limits = limits
        self._keys: tuple[Key, ...] = ()
        self.reload()

    def __len__(self) -> int:
        return len(self._keys)

    def reload(self) -> None:
        """Read the file again. If it cannot be used, the keys stay as they are."""
        if self.path is not None:
            self._keys = read_keys(self.path, self._limits)

    def warning(self) -> str | None:
        """What is wrong with the permissions of the file."""
        if self.path is None or os.name != "posix":
            return None
        mode = stat.S_IMODE(self.path.stat().st_mode)
        if not mode & 0o007:
            return None
        found = f"everybody on this computer may read {self.path} (mode {mode:04o})"
        return f"warning: {found}: chmod 600 {self.path}"

    def owner(self, headers: Iterable[tuple[bytes, bytes]]) -> Key:
        """Whose key the headers of a request bring; ApiError 401 if it is none of the file's."""
        if self.path is None:
            return ANONYMOUS
        digest = hashlib.sha256(_presented(headers)).digest()
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        if found is None:
            raise _unauthorized("wrong API key")
        return found


def _presented(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """The key in `Authorization: Bearer KEY` or `x-api-key: KEY`; ApiError 401 if there is none, or more than
    one.
    """
    found: dict[bytes, bytes] = {}
    for name, value in headers:
        if name in (b"authorization", b"x-api-key"):
            if name in found:
                raise _unauthorized(f"more than one {name.decode()} header")
            found[name] = value.strip()
    if b"authorization" in found:
        scheme, _, key = found[b"authorization"].partition(b" ")
        if scheme.lower() != b"bearer":
            raise _unauthorized("the Authorization header is not 'Bearer KEY'")
        found[b"authorization"] = key.strip()
    presented = set(found.values()) - {b""}
    if not presented:
        raise _unauthorized("no API key: send 'Authorization: Bearer KEY' or 'x-api-key: KEY'")
    if len(presented) > 1:
        raise _unauthorized("Authorization and x-api-key are two different keys")
    return presented.pop()


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", type="authentication_error")


def read_keys(path: Path, limits: KeyLimits = NO_LIMITS) -> tuple[Key, ...]:
    """The keys of a file; ValueError or OSError if there is none in it or a line is wrong. No message shows a
    key.
    """
    with open(path, "rb") as file:
        data = file.read(MAX_FILE + 1)
    if len(data) > MAX_FILE:
        raise ValueError(f"{path}: a file of API keys has at most {MAX_FILE} bytes")
    keys: list[Key] = []
    for number, line in enumerate(data.decode("utf-8", "replace").splitlines(), 1):
        words = line.split()
        if words and not words[0].startswith("#"):
            try:
                keys.append(_parse(words, keys, limits))
            except ValueError as error:
                raise ValueError(f"{path}: line {number}: {error}") from None
    if not keys:
        raise ValueError(f"{path}: no key in it; a line is NAME KEY [running=N] [queue=N] [priority=N]")
    return tuple(keys)


def _parse(words: list[str], before: list[Key], usual: KeyLimits) -> Key:
    if len(words) < 2:
        raise ValueError("a line is NAME KEY [running=N] [queue=N] [priority=N]")
    name, secret, *settings = words
    if not _NAME.fullmatch(name):
        raise ValueError("a name has at most 64 letters, digits and . _ @ -")
    if not _KEY.fullmatch(secret):
        raise ValueError("a key is made of visible ASCII characters")
    values: dict[str, int] = {}
    for setting in settings:
        match = _LIMIT.fullmatch(setting)
        if match is None or match[1] in values:
            raise ValueError("after the key come running=N, queue=N and priority=N, each once at most")
        values[match[1]] = int(match[2])
    if values.get("running", 1) < 1 or values.get("queue", 0) < 0:
        raise ValueError("running is at least 1 and queue at least 0")
    limits = KeyLimits(values.get("running", usual.running), values.get("queue", usual.queue))
    key = Key(name, hashlib.sha256(secret.encode()).digest(), limits, values.get("priority", 0))
    if any(key.name == other.name for other in before):
        raise ValueError(f"{name} is there twice")
    if any(key.digest == other.digest for other in before):
        raise ValueError(f"{name} has the key of a line before")
    return key
