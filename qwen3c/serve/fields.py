"""A JSON object whose fields are taken one by one, each checked.

What changes the meaning of a request and cannot be done is an error that names the field. A field that nobody
asks for and that is nearly a known one is taken for a misspelt one, and is an error, too.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from .errors import ApiError

SHOWN = 60  # characters of a value in an error
DEEPEST = 100  # how far objects and lists of a body may nest: what comes after walks them by recursion
MOST_UNKNOWN = 100  # fields that nobody asked for: each is compared with all known ones
NEAR = 0.84  # how alike an unknown name is to a known one that was meant


_recorded: ContextVar[dict[str, list[dict[str, Any]]] | None] = ContextVar("recorded", default=None)


@contextmanager
def recorded() -> Iterator[dict[str, list[dict[str, Any]]]]:
    """Within, what Fields are asked for is noted: dotted path -> JSON schemas of
    what may be there, one an inquiry.

    So the OpenAPI document says what the code takes, and nothing else.
    """
    schemas: dict[str, list[dict[str, Any]]] = {}
    token = _recorded.set(schemas)
    try:
        yield schemas
    finally:
        _recorded.reset(token)


def parse_json(body: bytes) -> Any:
    """The JSON value of a body; ApiError 400 if it is none. NaN and Infinity, which are
    no JSON, are left to Fields.
    """
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8 at byte {error.start}", code="invalid_json") from None
    try:
        return json.loads(text, parse_int=_integer, object_pairs_hook=_object)
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply", code="invalid_json") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object. ApiError 400 if a key is there twice: two readers may believe two different values."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = _short_path(next(name for i, name in enumerate(names) if name in names[:i]))
        raise ApiError(400, f"the key {twice!r} is twice in one object", param=twice, code="duplicate_key")
    return found


def _integer(digits: str) -> int | float:
    """An integer; one of hundreds of digits, which no field can mean, as an infinite number."""
    return int(digits) if len(digits) < 300 else math.copysign(math.inf, -1 if digits[0] == "-" else 1)


class Fields:
    """The fields of a JSON object. null counts as absent.

    value: the object; ApiError 400 if it is none. where: its dotted path, "" for the body itself.
    """

    def __init__(self, value: Any, where: str = "") -> None:
        if not isinstance(value, dict):
            what = f"{where} is" if where else "the body is"
            raise ApiError(400, f"{what} {_kind(value)}, not an object", param=where or None)
        _check(value, where)
        self._value: dict[str, Any] = value
        self._where = where
        self._known: set[str] = set()

    @property
    def value(self) -> dict[str, Any]:
        """The object itself."""
        return self._value

    def __contains__(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self._value.get(name) is not None

    def path(self, name: str) -> str:
        """The dotted path of a field."""
        return f"{self._where}.{name}" if self._where else name

    def error(self, name: str, reason: str, code: str | None = None) -> ApiError:
        """An ApiError 400 about the field: its path, then the reason."""
        path = self.path(name)
        return ApiError(400, f"{path} {reason}", param=path, code=code)

    def raw(self, name: str) -> Any:
        """The value, whatever it is."""
        return self._take(name, {})

    def _take(self, name: str, schema: dict[str, Any]) -> Any:
        """The value of a field, which `schema` describes."""
        self._known.add(name)
        noted = _recorded.get()
        if noted is not None:
            path = re.sub(r"\[\d+\]", "[]", self.path(name))
            noted.setdefault(path, []).append(schema)
        return self._value.get(name)

    def text(
        self, name: str, default: str | None = None, *, choices: Sequence[str] | None = None
    ) -> str | None:
        """A text, one of `choices` if they are given."""
        value = self._take(name, {"type": "string"} | ({"enum": list(choices)} if choices else {}))
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.error(name, f"is {_kind(value)}, not a text")
        if choices is not None and value not in choices:
            raise self.error(name, f"= {_short(value)} is not one of {', '.join(choices)}")
        return value

    def whole(self, name: str, low: int, high: int, default: int | None = None) -> int | None:
        """An integer from low to high; 5.0 is one, true is none."""
        value = self._take(name, {"type": "integer", "minimum": low, "maximum": high})
        if value is None:
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.error(name, f"= {_short(value)} is not a whole number")
        if not low <= value <= high:
            raise self.error(name, f"= {_short(value)} is outside {low} to {high}")
        return value

    def number(self, name: str, low: float, high: float, default: float | None = None) -> float | None:
        """A number from low to high."""
        value = self._take(name, {"type": "number", "minimum": low, "maximum": high})
        if value is None:
            return default
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise self.error(name, f"= {_short(value)} is not a number")
        if not low <= value <= high:
            raise self.error(name, f"= {_short(value)} is outside {low:g} to {high:g}")
        return float(value)

    def flag(self, name: str, default: bool | None = None) -> bool | None:
        """true or false."""
        value = self._take(name, {"type": "boolean"})
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(name, f"= {_short(value)} is neither true nor false")
        return value

    def items(self, name: str, limit: int, default: list[Any] | None = None) -> list[Any] | None:
        """A list of at most `limit` values."""
        value = self._take(name, {"type": "array", "maxItems": limit})
        if value is None:
            return default
        if not isinstance(value, list):
            raise self.error(name, f"is {_kind(value)}, not a list")
        if len(value) > limit:
            raise self.error(name, f"has {len(value)} items, more than {limit}")
        return value

    def texts(self, name: str, limit: int, default: list[str] | None = None) -> list[str] | None:
        """A text, or a list of at most `limit` of them."""
        texts = {"type": "array", "maxItems": limit, "items": {"type": "string"}}
        value = self._take(name, {"anyOf": [{"type": "string"}, texts]})
        if isinstance(value, str):
            return [value]
        found = self.items(name, limit, default)
        for i, item in enumerate(found or ()):
            if not isinstance(item, str):
                raise self.error(f"{name}[{i}]", f"is {_kind(item)}, not a text")
        return found

    def object(self, name: str) -> Fields | None:
        """An object, as Fields of its own."""
        value = self._take(name, {"type": "object"})
        return None if value is None else Fields(value, self.path(name))

    def refuse(self, name: str, why: str, unless: Sequence[Any] = ()) -> None:
        """ApiError 400 if the field is there and is none of `unless`: it changes the
        meaning and cannot be done.
        """
        value = self._take(name, {"enum": [*unless, None], "description": why, "x-qwen3c-refused": True})
        # 0 == False, but a client that says one does not mean the other
        if value is not None and not any(type(value) is type(one) and value == one for one in unless):
            raise self.error(name, f"is not supported: {why}", "unsupported_parameter")

    def ignore(self, *names: str) -> None:
        """These fields change nothing here, and docs/SERVING.md says so."""
        for name in names:
            self._take(name, {"description": "taken, and changes nothing", "x-qwen3c-ignored": True})

    def finish(self) -> list[str]:
        """Names of fields that nobody asked for; ApiError 400 if one is nearly a known name."""
        unknown = [name for name in self._value if name not in self._known]
        if len(unknown) > MOST_UNKNOWN:
            reason = f"is one of {len(unknown)} fields that are unknown here, more than {MOST_UNKNOWN}"
            raise self.error(unknown[0][:SHOWN], reason, "unknown_parameter")
        for name in unknown:
            near = difflib.get_close_matches(name, self._known, 1, NEAR) if len(name) < SHOWN else []
            if near:
                raise self.error(name, f"is no field; did you mean {near[0]!r}?", "unknown_parameter")
        return unknown


def _check(value: Any, where: str) -> None:
    """ApiError 400 for what nobody can mean anywhere in a value.

    That is half a surrogate pair, which no UTF-8 can say, a number that is none or
    infinite, and endless nesting.
    """
    waiting = [(value, where, 0)]
    while waiting:
        value, path, depth = waiting.pop()
        fault = None
        if isinstance(value, str):
            if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
                fault = "holds half a surrogate pair"
        elif isinstance(value, float):
            fault = None if math.isfinite(value) else "is no finite number"
        elif isinstance(value, (dict, list)) and depth == DEEPEST:
            fault = f"is nested more than {DEEPEST} deep"
        elif isinstance(value, dict):
            for key, item in value.items():
                waiting.append((key, path, depth + 1))
                waiting.append((item, f"{path}.{key}" if path else key, depth + 1))
        elif isinstance(value, list):
            # not the integers, of which a prompt may have a million
            waiting += [
                (item, f"{path}[{i}]", depth + 1) for i, item in enumerate(value) if type(item) is not int
            ]
        if fault:
            raise ApiError(400, f"{_short_path(path)} {fault}", param=_short_path(path) if path else None)


def _short_path(path: str) -> str:
    return (path if len(path) <= SHOWN else path[: SHOWN - 1] + "…") or "the body"


def _kind(value: Any) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", str: "a text", list: "a list"}
    return "null" if value is None else names.get(type(value), "an object")


def _short(value: Any) -> str:
    text = json.dumps(value) if not isinstance(value, int) or abs(value) < 1 << 80 else "a huge number"
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"
