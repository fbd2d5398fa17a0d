"""How a server is set up: defaults, then a TOML file, then flags, as one Settings.

    port = 8080
    api_keys_file = "keys"
    cache_memory = "2 GiB"
    [models]
    small = "qwen3-0.6b.bin"
    large = { path = "qwen3-8b.bin", kv = "int8" }

Every value is checked where it comes in; an error names the file or the flag, the key, and what was expected.
A file has no secrets: keys are in files of their own.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import ipaddress
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..system.mistakes import hub_name
from .logs import LEVELS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Check = Callable[[Any], Any]  # a value as TOML or a flag gives it -> the value; ValueError: what was expected
MAX_FILE = 1 << 20  # bytes
UNITS = {
    "B": 1,
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
    "TiB": 1 << 40,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}
_SIZE = re.compile(rf"(\d{{1,12}}(?:\.\d{{1,6}})?) ?({'|'.join(UNITS)})")
_ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@/-]{0,127}")
_HOST = re.compile(r"[A-Za-z0-9._-]+|\[?[0-9A-Fa-f:.]+\]?")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s?#@]+")
_HEADER_HOST = re.compile(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::\d{1,5})?")


# ----------------------------------------------------------------------------
# Checks


def whole(low: int, high: int) -> Check:
    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"a whole number from {low} to {high}")
        return value

    return check


def seconds(low: float, high: float = 86400.0) -> Check:
    def check(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise ValueError(f"seconds from {low:g} to {high:g}")
        return float(value)

    return check


def text(pattern: re.Pattern[str] | None = None, what: str = "a text") -> Check:
    def check(value: Any) -> str:
        if not isinstance(value, str) or not value or (pattern is not None and not pattern.fullmatch(value)):
            raise ValueError(what)
        return value

    return check


def choice(*names: str) -> Check:
    def check(value: Any) -> str:
        if value not in names:
            raise ValueError(f"one of {', '.join(names)}")
        return str(value)

    return check


def flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def size(value: Any) -> int:
    """Bytes, as a number or as in "2 GiB"."""
    match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if match:
        return int(float(match[1]) * UNITS[match[2]])
    if isinstance(value, str) and value.strip().isdecimal() and len(value) < 19:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 60:
        raise ValueError('bytes, such as 2147483648 or "2 GiB"')
    return value


def each(check: Check, what: str) -> Check:
    def check_all(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"a list of {what}")
        return tuple(map(check, value))

    return check_all


def _url(value: Any) -> str:
    try:
        parts = urlsplit(value if isinstance(value, str) else "")
        sound = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        sound = False
    if not sound:
        raise ValueError("a URL such as https://api.example.com/v1")
    if parts.username is not None or parts.password is not None or parts.query:
        raise ValueError(
            "a URL without a password or a query; a key comes from the environment or a credential"
        )
    return str(value)


def _origin(value: Any) -> str:
    if not isinstance(value, str) or (value != "*" and not _ORIGIN.fullmatch(value)):
        raise ValueError("an origin such as https://chat.example.com, without a path, or *")
    return value


def _setting(default: Any, check: Check) -> Any:
    return field(default=default, metadata={"check": check})


# ----------------------------------------------------------------------------
# Settings


@dataclass(frozen=True)
class ModelSettings:
    """One model, and what it has of its own: None for the server's setting. draft: the path of a smaller
    model that guesses at its next tokens.
    """

    path: str = _setting("", text(what="the path of a model.bin, or a name on the Hub"))
    kv: str | None = _setting(None, choice("int8", "f16", "f32"))
    context: int | None = _setting(None, whole(0, 1 << 24))
    cache_memory: int | None = _setting(None, size)
    threads: int | None = _setting(None, whole(1, 4096))
    draft: str | None = _setting(None, text(what="the path of a model.bin"))


@dataclass(frozen=True)
class UpstreamSettings:
    """A provider that is asked first. Its key comes from the variable `key_env`, or a systemd credential of
    that name.
    """

    url: str = _setting("", _url)
    model: str = _setting("", text(what="the name of a model"))
    key_env: str = _setting("QWEN3C_UPSTREAM_KEY", text(re.compile(r"\w+"), "the name of a variable"))
    connect_timeout: float = _setting(2.0, seconds(0.01, 60))
    first_delta_timeout: float = _setting(15.0, seconds(0.01, 600))
    silence_timeout: float = _setting(30.0, seconds(0.01, 600))
    requests_per_day: int | None = _setting(None, whole(0, 1 << 40))
    tokens_per_day: int | None = _setting(None, whole(0, 1 << 50))
    state_file: str | None = _setting(None, text(what="the path of a file"))
    insecure: bool = _setting(False, flag)
    env_proxy: bool = _setting(False, flag)


@dataclass(frozen=True)
class Settings:
    """Everything a server can be told. Times in seconds, sizes in bytes; None: what suits the machine or the
    model.
    """

    host: str = _setting("127.0.0.1", text(_HOST, "a host name or an address"))
    port: int = _setting(8080, whole(0, 65535))
    fd: int | None = _setting(None, whole(0, 1 << 20))
    models: Mapping[str, ModelSettings] = field(default_factory=dict)
    default_model: str | None = _setting(None, text(_ALIAS, "the alias of a model"))
    # requests
    max_gap: float | None = _setting(None, seconds(0.01, 60))
    cache_memory: int | None = _setting(None, size)
    running: int = _setting(64, whole(1, 4096))
    queue: int = _setting(128, whole(0, 1 << 20))
    key_running: int | None = _setting(None, whole(1, 4096))
    key_queue: int | None = _setting(None, whole(0, 1 << 20))
    idle_unload: float | None = _setting(None, seconds(1, 10**9))
    ping: float = _setting(10.0, seconds(0.01, 3600))
    # the machine
    context: int | None = _setting(None, whole(0, 1 << 24))
    kv: str = _setting("f16", choice("int8", "f16", "f32"))
    threads: int | None = _setting(None, whole(1, 4096))
    isa: str | None = _setting(None, text(what="an instruction set"))
    huge_pages: bool = _setting(False, flag)
    drafts: bool = _setting(True, flag)
    draft: str | None = _setting(None, text(what="the path of a model.bin"))  # for the default model
    # who may ask, and how
    api_keys_file: str | None = _setting(None, text(what="the path of a file"))
    allowed_hosts: tuple[str, ...] = _setting(
        (), each(text(_HEADER_HOST, "host names, without http://"), "host names")
    )
    cors_origins: tuple[str, ...] = _setting((), each(_origin, "origins"))
    max_body: int = _setting(4 << 20, size)
    header_timeout: float = _setting(10.0, seconds(0.01, 3600))
    body_timeout: float = _setting(30.0, seconds(0.01, 3600))
    write_timeout: float = _setting(30.0, seconds(0.01, 3600))
    keep_alive: float = _setting(75.0, seconds(0.01, 3600))
    connections: int = _setting(2048, whole(1, 1 << 20))
    # how it runs
    drain: float = _setting(5.0, seconds(0, 3600))
    metrics: bool = _setting(True, flag)
    log_json: bool = _setting(False, flag)
    log_level: str = _setting("info", choice(*LEVELS))
    offline: bool = _setting(False, flag)
    mcp_servers: str | None = _setting(None, text(what="the path of a file"))
    upstream: UpstreamSettings | None = None

    @property
    def public(self) -> bool:
        """Whether other computers can reach the address."""
        return not is_loopback(self.host)


PATHS = ("api_keys_file", "mcp_servers", "draft")  # relative to the file that names them
HOW_TO_GIVE_KEYS = "--api-keys FILE (a line: NAME KEY)"
CREDENTIAL = "api-keys"  # the file of keys that systemd hands over


def is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


# ----------------------------------------------------------------------------
# Sources


def settings(file: str | None, flags: Mapping[str, Any], names: Mapping[str, str]) -> Settings:
    """Defaults, then what a TOML file says, then flags; a flag for models adds to those of the file.

    flags: field -> value, those that were given. names: field -> the flag, for errors. ValueError or OSError.
    """
    values = read(file) if file is not None else {}
    for name, value in flags.items():
        checked = _checked(Settings, name, value, names[name])
        values[name] = {**checked, **_without(values.get(name, {}), checked)} if name == "models" else checked
    credential = Path(os.environ.get("CREDENTIALS_DIRECTORY", ""), CREDENTIAL)
    if "api_keys_file" not in values and "CREDENTIALS_DIRECTORY" in os.environ and credential.is_file():
        values["api_keys_file"] = str(credential)
    for name in PATHS:
        if name in values:
            values[name] = _whole(name, Path(), values[name])
    for alias, model in values.get("models", {}).items():
        values["models"][alias] = _moved(model, functools.partial(_model_in, Path()))
    if values.get("upstream") is not None:
        values["upstream"] = _placed(values["upstream"], Path())
    made = Settings(**values)
    _check_together(made)
    return made


def _moved(model: ModelSettings, where: Callable[[str], str]) -> ModelSettings:
    """A model whose paths went through `where`."""
    draft = None if model.draft is None else where(model.draft)
    return dataclasses.replace(model, path=where(model.path), draft=draft)


def _whole(name: str, folder: Path, path: str) -> str:
    """The whole path that a setting of PATHS has; a draft is a model."""
    return _model_in(folder, path) if name == "draft" else os.path.abspath(folder / path)


def _model_in(folder: Path, path: str) -> str:
    """The whole path of a model; the name of one on the Hub stays as it is, unless a file has it."""
    whole = os.path.abspath(folder / path)
    return path if not os.path.exists(whole) and hub_name(path) else whole


def _without(models: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    return {alias: model for alias, model in models.items() if alias not in others}


def _check_together(made: Settings) -> None:
    if made.default_model is not None and made.default_model not in made.models:
        known = ", ".join(made.models) or "none"
        raise ValueError(f"default_model is {made.default_model}, but the models are: {known}")
    if made.public and made.fd is None and made.api_keys_file is None:
        raise ValueError(f"--host {made.host} lets other computers in, which takes keys: {HOW_TO_GIVE_KEYS}")
    if "*" in made.cors_origins and made.api_keys_file is None:
        raise ValueError(
            f"--cors-origin '*' lets the page of any site ask, which takes keys: {HOW_TO_GIVE_KEYS}"
        )


def read(path: str) -> dict[str, Any]:
    """What a TOML file sets, checked; ValueError or OSError. Paths in it are relative to its folder."""
    with open(path, "rb") as file:
        data = file.read(MAX_FILE + 1)
    if len(data) > MAX_FILE:
        raise ValueError(f"{path}: a configuration has at most {MAX_FILE} bytes")
    try:
        table = tomllib.loads(data.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not TOML: {error}") from None
    values = {
        name: _checked(Settings, name, value, f"{path}: {name}")
        for name, value in _known(Settings, table, f"{path}: ")
    }
    folder = Path(path).parent
    for name in PATHS:
        if name in values:
            values[name] = _whole(name, folder, values[name])
    if "models" in values:
        move = functools.partial(_model_in, folder)
        values["models"] = {alias: _moved(model, move) for alias, model in values["models"].items()}
    if "upstream" in values:
        values["upstream"] = _placed(values["upstream"], folder)
    return values


def _placed(upstream: UpstreamSettings, folder: Path) -> UpstreamSettings:
    """The same with the path of its file whole."""
    if upstream.state_file is None:
        return upstream
    return dataclasses.replace(upstream, state_file=os.path.abspath(folder / upstream.state_file))


def _known(kind: type[Any], table: Mapping[str, Any], where: str) -> Iterator[tuple[str, Any]]:
    names = [item.name for item in dataclasses.fields(kind)]
    for name, value in table.items():
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            meant = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(names)}"
            raise ValueError(f"{where}{name}: there is no such setting{meant}")
        yield name, value


def _checked(kind: type[Any], name: str, value: Any, where: str) -> Any:
    """The value of a field; ValueError that begins with `where`."""
    if name == "models":
        return _models(value, where)
    if name == "upstream":
        return _table(UpstreamSettings, value, where, ("url", "model"))
    check: Check = next(item for item in dataclasses.fields(kind) if item.name == name).metadata["check"]
    try:
        return check(value)
    except ValueError as error:
        given = "" if check is _url else f", not {_shown(value)}"  # which may hold a password
        raise ValueError(f"{where}: expected {error}{given}") from None


def _models(value: Any, where: str) -> dict[str, ModelSettings]:
    if not isinstance(value, Mapping):
        raise ValueError(
            f'{where}: expected a table such as [models] small = "model.bin", not {_shown(value)}'
        )
    models = {}
    for alias, model in value.items():
        if not _ALIAS.fullmatch(alias):
            raise ValueError(f"{where}: {_shown(alias)} is no alias: letters, digits and . _ : @ / -")
        table = {"path": model} if isinstance(model, str) else model
        models[alias] = _table(ModelSettings, table, f"{where}.{alias}", ("path",))
    return models


def _table(kind: type[Any], value: Any, where: str, needed: tuple[str, ...]) -> Any:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: expected a table with {' and '.join(needed)}, not {_shown(value)}")
    values = {
        name: _checked(kind, name, item, f"{where}.{name}") for name, item in _known(kind, value, f"{where}.")
    }
    for name in needed:
        if name not in values:
            raise ValueError(f"{where}: {name} is missing")
    return kind(**values)


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


# ----------------------------------------------------------------------------
# Back to TOML


def to_toml(made: Settings) -> str:
    """A configuration file that says what `made` says; what is not set stands there as a comment."""
    plain, tables = [], []
    for item in dataclasses.fields(Settings):
        value = getattr(made, item.name)
        if item.name == "models":
            for alias, model in value.items():
                tables += ["", f"[models.{_quoted(alias)}]", *_pairs(model)]
        elif item.name == "upstream":
            tables += ["", "[upstream]", *_pairs(value)] if value is not None else []
        else:
            plain += _pair(item.name, value)
    return "\n".join([*plain, *tables, ""])


def _pairs(table: Any) -> list[str]:
    return [
        line for item in dataclasses.fields(table) for line in _pair(item.name, getattr(table, item.name))
    ]


def _pair(name: str, value: Any) -> list[str]:
    return [f"# {name} is not set"] if value is None else [f"{name} = {_value(value)}"]


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return f"[{', '.join(map(_value, value))}]"
    return _quoted(value) if isinstance(value, str) else repr(value)


def _quoted(value: str) -> str:
    """A TOML string: JSON's, except that DEL is escaped as well."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
