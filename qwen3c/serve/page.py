"""The chat page at `/`: one document, its headers, and how it travels.

data/page.html, page.css and page.js are the page, data/marked.js its reader of markdown; together they are
one document that loads nothing. Its policy names the hash of every script and style in it, so the browser
runs nothing else, and forbids every way of making elements out of text (`trusted-types 'none'`).
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

DATA = Path(__file__).parents[1] / "data"
PAGE = DATA / "page.html"
# marked.js is lib/marked.umd.js of npm's marked 18.2.1, as it is; its licence: marked.LICENSE.md
PARTS = {"STYLE": DATA / "page.css", "SCRIPT": DATA / "page.js", "MARKED": DATA / "marked.js"}
MARKED_SHA256 = "bb95d4c15f1289f78486eaacebf3bb18688475ed58a040ef762ed49337090542"


@dataclass(frozen=True)
class Document:
    """The page as bytes, once as they are and once compressed, with the headers of both."""

    body: bytes
    compressed: bytes
    headers: dict[str, str]

    @property
    def etag(self) -> str:
        return self.headers["etag"]


@cache
def document() -> Document:
    """The page of this installation, put together when it is first asked for."""
    return assemble(
        PAGE.read_text(encoding="utf-8"),
        {name: path.read_text(encoding="utf-8") for name, path in PARTS.items()},
    )


def assemble(page: str, parts: Mapping[str, str]) -> Document:
    """The document of a page in which {{NAME}} stands for a part."""
    # the address of a source map: nobody is to fetch it
    whole = {name: re.sub(r"\n//# sourceMappingURL=\S*\s*$", "\n", part) for name, part in parts.items()}
    text = re.sub(r"\{\{([A-Z]+)\}\}", lambda found: whole[found[1]], page)
    body = text.encode()
    headers = {
        "content-type": "text/html; charset=utf-8",
        "content-security-policy": policy(text),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
        "cache-control": "no-cache",  # asked for again each time, and answered by 304
        # weak: the bytes differ with their encoding
        "etag": f'W/"{hashlib.sha256(body).hexdigest()[:32]}"',
        "vary": "accept-encoding",
    }
    return Document(body, gzip.compress(body, 9, mtime=0), headers)


def policy(text: str) -> str:
    """The content security policy of a document: its own scripts and styles, its own server, nothing else."""
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src {_hashes('script', text)}",
            f"style-src {_hashes('style', text)}",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        ]
    )


def _hashes(tag: str, text: str) -> str:
    """The sources of a policy that allow the inline blocks of a tag."""
    blocks = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(b.encode()).digest()).decode()}'" for b in blocks
    )


async def page(request: Request) -> Response:
    """The answer to `GET /`: the page, or 304 where the browser has it already."""
    return answer(request.headers.get("if-none-match", ""), request.headers.get("accept-encoding", ""))


def answer(if_none_match: str, accept_encoding: str) -> Response:
    """The page for a browser that has the versions `if_none_match` and reads `accept_encoding`."""
    found = document()
    if found.etag in re.split(r"\s*,\s*", if_none_match.strip()) or if_none_match.strip() == "*":
        kept = ("etag", "cache-control", "vary", "content-security-policy")
        return Response(status_code=304, headers={name: found.headers[name] for name in kept})
    if _accepts_gzip(accept_encoding):
        return Response(found.compressed, headers={**found.headers, "content-encoding": "gzip"})
    return Response(found.body, headers=found.headers)


def _accepts_gzip(accept_encoding: str) -> bool:
    """Whether gzip is among the encodings, and not by `q=0`."""
    for part in accept_encoding.lower().split(","):
        name, _, weight = part.partition(";")
        if name.strip() in ("gzip", "*"):
            return not re.fullmatch(r"\s*q\s*=\s*0(\.0*)?\s*", weight)
    return False
