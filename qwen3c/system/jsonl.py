"""Files of one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of every line that is not empty. ValueError names file and line; OSError."""
    empty = True
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            if b"\\u" in line:
                json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            fault = f"holds half of a surrogate pair, {error.object[error.start]!r}: that is no character"
            raise ValueError(f"{where}: {fault}") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: byte {error.start} is not UTF-8") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: is not JSON: {error}") from None
        if not isinstance(value, dict):
            raise ValueError(f"{where}: is a JSON {type(value).__name__}, expected an object")
        empty = False
        yield number, value
    if empty:
        raise ValueError(f"{path}: is empty")
