"""Whatever goes wrong between the Hub and here heals, or is one line; and the next start finishes.

python -m pytest tests/hub/test_faults.py
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hub_server import Fault, Hub

from qwen3c.hub import download, obtain
from qwen3c.hub.download import HubError
from qwen3c.system.names import parse

API, CDN, CONFIG = r"^/api/", r"^cdn:", r"config\.json"
ALL = 1_000_000


def get(name: str) -> bytes:
    parsed = parse(name)
    assert parsed is not None
    return obtain.model(parsed).read_bytes()


def refused(name: str) -> str:
    """The one line that a name ends in."""
    with pytest.raises(HubError) as caught:
        get(name)
    line = str(caught.value)
    assert "\n" not in line and len(line) < 400 and name.partition(":")[0].partition("@")[0] in line
    assert "Traceback" not in line and "huggingface_hub" not in line
    return line


def healed(cache: Path, converted: bytes) -> None:
    """With everything well again the model is there, and nothing that was begun."""
    assert get("owner/Small") == converted
    assert not [path for path in cache.rglob("*") if path.suffix in (".part", ".tmp")]


HEALING = {
    "busy": [Fault(API, "status", 503, 2)],
    "busy everywhere": [
        Fault(API, "status", 500, 1), Fault(CONFIG, "status", 502, 2), Fault(CDN, "status", 504, 2)
    ],
    "told to wait": [Fault(API, "status", 429, 1, {"Retry-After": "0"}), Fault(CDN, "status", 429, 1)],
    "no answer": [Fault(API, "hang", 1.0, 1)],
    "no answer from the CDN": [Fault(CDN, "hang", 1.0, 1)],
    "cut": [Fault(CDN, "cut", 20_000, 3)],
    "cut again and again": [Fault(CDN, "cut", 5_000, 40)],
    "cut at once": [Fault(CDN, "cut", 0, 2)],
    "cut in a small file": [Fault("tokenizer.json", "cut", 100, 2)],
    "reset": [Fault(CDN, "reset", 30_000, 2)],
    "a bit is wrong": [Fault(CDN, "flip", None, 1)],
    "a bit is wrong in a text": [Fault("tokenizer.json", "flip", None, 1)],
    "less than there is": [Fault(CDN, "short", 1000, 2)],
    "all of it again": [Fault(CDN, "cut", 9000, 1), Fault(CDN, "no range", None, 1)],
    "slow": [Fault(CDN, "slow", 0.02)],
}  # fmt: skip


@pytest.mark.parametrize("faults", HEALING.values(), ids=HEALING)
def test_what_passes_heals_in_the_same_start(
    hub: Hub, cache: Path, converted: bytes, faults: list[Fault]
) -> None:
    hub.faults = [Fault(f.where, f.what, f.value, f.times, f.headers) for f in faults]
    healed(cache, converted)
    assert all(fault.times == 0 or fault.times > 100 for fault in hub.faults)


class Lasting(NamedTuple):
    faults: list[Fault]
    said: str


LASTING = {
    "busy": Lasting([Fault(API, "status", 503)], "answers with error 503: try again later"),
    "the CDN is busy": Lasting([Fault(CDN, "status", 500)], "answers with error 500"),
    "too many requests": Lasting(
        [Fault(API, "status", 429, headers={"Retry-After": "3600"})], "try again in 3600 s"
    ),
    "forbidden": Lasting([Fault(API, "status", 403)], "the token may not read it"),
    "the CDN forbids": Lasting([Fault(CDN, "status", 403)], "the token may not read it"),
    "a web page": Lasting([Fault(API, "body", b"<html>Log in</html>")], "does not answer as the Hub"),
    "an empty object": Lasting([Fault(API, "body", b"{}")], "does not answer as the Hub"),
    "no bytes": Lasting([Fault(CDN, "cut", 0)], r"cannot be reached .* is there a network\?"),
    "no answer": Lasting([Fault(API, "hang", 0.7)], "cannot be reached"),
    "a file is not there": Lasting(
        [Fault(CONFIG, "status", 404, headers={"X-Error-Code": "EntryNotFound"})], "listed is not there"
    ),
    "damaged": Lasting([Fault(CDN, "flip")], "arrives damaged"),
    "too short": Lasting([Fault(CDN, "short", 0)], "ends after 0 of"),
    "too long": Lasting([Fault(CDN, "long", 10)], "is longer than the"),
    "another part": Lasting(
        [Fault(CDN, "cut", 9000, 1), Fault(CDN, "other range")], "bytes from 9000 on were asked for"
    ),
    "in circles": Lasting([Fault(CDN, "move")], "cannot be reached .*redirect"),
}  # fmt: skip


@pytest.mark.parametrize("fault", LASTING.values(), ids=LASTING)
def test_what_stays_is_one_line_and_the_next_start_finishes(
    hub: Hub, cache: Path, converted: bytes, fault: Lasting
) -> None:
    hub.faults = [Fault(f.where, f.what, f.value, f.times, f.headers) for f in fault.faults]
    assert re.search(fault.said, refused("owner/Small"))
    assert not list(cache.rglob("*.bin"))
    hub.faults = []
    healed(cache, converted)


def test_what_has_arrived_is_not_asked_for_again(hub: Hub, cache: Path, converted: bytes) -> None:
    files = hub.repositories["owner/Small"].files
    size = sum(len(data) for path, data in files.items() if not path.endswith((".bin", ".py")))
    hub.faults = [Fault(CDN, "cut", 50_000, 1), Fault(CDN, "cut", 0)]
    refused("owner/Small")
    sent = hub.sent
    hub.faults = []
    healed(cache, converted)
    assert sent >= 50_000 and hub.sent == size


# ----------------------------------------------------------------------------
# Who may read


def test_a_wrong_token_is_named(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    line = refused("owner/Small")
    assert "the token is not accepted" in line and "hf_wrong" not in line


@pytest.mark.parametrize("closed", ["private", "gated"])
def test_what_is_closed_opens_with_a_token_that_the_cdn_never_sees(
    hub: Hub, cache: Path, converted: bytes, closed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    setattr(hub.repositories["owner/Small"], closed, True)
    line = refused("owner/Small")
    assert ("is gated: ask for access on" if closed == "gated" else "if it is private, log in") in line
    monkeypatch.setenv("HF_TOKEN", hub.token)
    healed(cache, converted)
    assert not hub.tokens_at_cdn and any(path.startswith("/owner/Small/") for _, path in hub.asked)


def test_what_is_not_there_is_named(hub: Hub, cache: Path) -> None:
    assert "no such file here, and no such model on http://127.0.0.1" in refused("owner/Nothing")
    assert "has no revision v9" in refused("owner/Small@v9")
    assert "has no Big.gguf; there are Small-Q8_0.gguf" in refused("owner/Small-GGUF:Big.gguf")
    assert "has no Big.gguf; it has no GGUF file" in refused("owner/Small:Big.gguf")
    assert "one of several parts" in refused("owner/Small-GGUF:Small-00001-of-00002.gguf")
    assert not list(cache.glob("owner*"))


def test_no_network_is_said(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert re.search(r"http://127\.0\.0\.1:9 cannot be reached \(.*refused.*\): is there a network\?",
                     refused("owner/Small"))  # fmt: skip


# ----------------------------------------------------------------------------
# What cannot be converted


@dataclass
class Change:
    """What a repository has in place of what is there; None takes a file away."""

    files: dict[str, Any]
    said: str
    name: str = "owner/Small"


def change_config(**keys: Any) -> Callable[[dict[str, bytes]], bytes]:
    return lambda files: json.dumps(json.loads(files["config.json"]) | keys).encode()


WEIGHTS = (
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
)
NO_WEIGHTS = dict.fromkeys(WEIGHTS)
UNFIT = {
    "fp8": Change(
        {"config.json": change_config(quantization_config={"quant_method": "fp8"})},
        "config.json: quantization_config says 'fp8': .* take the model's original .*: perhaps owner/Small$",
        "owner/Small-FP8",
    ),
    "awq": Change(
        {"config.json": change_config(quantization_config={"quant_method": "awq"})}, "perhaps owner/Small$",
        "owner/Small-AWQ",
    ),
    "gptq": Change(
        {"config.json": change_config(quantization_config={"quant_method": "gptq"})}, "perhaps owner/Small$",
        "owner/Small-GPTQ-Int4",
    ),
    "architecture": Change(
        {"config.json": change_config(architectures=["GPT2LMHeadModel"])},
        r"architectures is \['GPT2LMHeadModel'\], supported: Qwen3ForCausalLM",
    ),
    "not JSON": Change({"config.json": lambda files: b"{"}, "config.json: is not valid JSON"),
    "pickles": Change(NO_WEIGHTS, "has no safetensors but pytorch_model.bin, which is never opened"),
    "GGUF alone": Change(
        {**NO_WEIGHTS, "a-Q4_K_M.gguf": lambda files: b"GGUF", "a-Q8_0.gguf": lambda files: b"GGUF"},
        "has GGUF files alone: name one, such as owner/Small:a-Q8_0.gguf",
    ),
    "nothing": Change({**NO_WEIGHTS, "pytorch_model.bin": None}, "has neither model.safetensors nor"),
    "no tokenizer": Change({"tokenizer.json": None}, "has no tokenizer.json"),
    "adapter": Change(
        {"config.json": None, "adapter_config.json": lambda files: b"{}"}, "is a LoRA adapter: fetch its base"
    ),
    "a shard is missing": Change({WEIGHTS[1]: None}, f"{WEIGHTS[1]} is missing there"),
    "an index that leads elsewhere": Change(
        {WEIGHTS[2]: lambda files: b'{"weight_map": {"a": "../../evil.safetensors"}}'},
        "is not the name of a safetensors file",
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", UNFIT.values(), ids=UNFIT)
def test_what_cannot_be_converted_is_refused_before_the_weights_come(
    hub: Hub, cache: Path, change: Change
) -> None:
    files = dict(hub.repositories["owner/Small"].files)
    made = {path: make(files) if make else None for path, make in change.files.items()}
    hub.add(change.name, {path: data for path, data in {**files, **made}.items() if data is not None})
    assert re.search(change.said, refused(change.name))
    assert not [path for path in hub.paths() if path.endswith((".safetensors", ".bin", ".py", ".gguf"))]
    assert str(cache) not in refused(change.name)


def test_weights_that_do_not_fit_the_config_are_named_by_the_model(hub: Hub, cache: Path) -> None:
    files = dict(hub.repositories["owner/Small"].files)
    files["config.json"] = change_config(num_hidden_layers=5)(files)
    hub.add("owner/Small", files)
    assert re.match(r"owner/Small: .*model\.layers\.4", refused("owner/Small"))


@pytest.mark.parametrize(
    ("listed", "said"),
    [
        ({"size": 100}, "is longer than the 100 bytes"),
        ({"size": 10_000_000}, "ends after|answers with error 416"),
        ({"lfs": {"sha256": "0" * 64, "size": 1, "pointerSize": 1}}, "arrives damaged"),
    ],
)
def test_a_listing_that_is_wrong_is_one_line(
    hub: Hub, cache: Path, listed: dict[str, Any], said: str
) -> None:
    hub.repositories["owner/Small"].listed = {WEIGHTS[0]: listed}
    assert re.search(said, refused("owner/Small"))


def test_a_commit_that_is_none_never_becomes_a_folder(hub: Hub, cache: Path) -> None:
    hub.repositories["owner/Small"].commit = "../../../evil"
    assert "is no commit" in refused("owner/Small")
    assert not list(cache.parent.rglob("evil*"))


# ----------------------------------------------------------------------------
# The disk


def test_a_disk_that_is_too_small_is_said_before_the_weights_come(
    hub: Hub, cache: Path, converted: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(cache.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    line = refused("owner/Small")
    assert re.search(
        r"needs about .* in .*cache \(.* to fetch and .* converted\), .* are free: `run.py -m models", line
    )
    assert not [path for path in hub.paths() if path.endswith(".safetensors")]
    monkeypatch.undo()


def test_a_disk_that_fills_up_keeps_what_has_arrived(
    hub: Hub, cache: Path, converted: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = download._response

    class Full:
        def __init__(self, response: Any) -> None:
            self.status_code, self._response = response.status_code, response

        def iter_bytes(self) -> Any:
            yield next(self._response.iter_bytes())
            raise OSError(28, "No space left on device")

    class Opened:
        def __init__(self, url: str, start: int) -> None:
            self._context = real(url, start)

        def __enter__(self) -> Full:
            return Full(self._context.__enter__())

        def __exit__(self, *error: Any) -> None:
            self._context.__exit__(None, None, None)

    monkeypatch.setattr(download, "_response", Opened)
    with pytest.raises(
        HubError, match=r"config.json.part: No space left on device; what has arrived is kept"
    ):
        get("owner/Small")
    monkeypatch.setattr(download, "_response", real)
    healed(cache, converted)
