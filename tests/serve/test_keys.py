"""API keys: read from a file, compared in constant time, never shown.

python -m pytest tests/serve/test_keys.py
"""

from __future__ import annotations

import hmac
from pathlib import Path

import pytest

from qwen3c.serve.ask import KeyLimits
from qwen3c.serve.errors import ApiError
from qwen3c.serve.keys import ANONYMOUS, Keys, read_keys

SECRET = "sk-canary-4f9c"


def keys_in(folder: Path, text: str, mode: int = 0o600) -> Path:
    path = folder / "keys"
    path.write_text(text)
    path.chmod(mode)
    return path


def bearer(secret: str) -> list[tuple[bytes, bytes]]:
    return [(b"authorization", b"Bearer " + secret.encode())]


def test_a_line_is_a_name_a_key_and_limits(tmp_path: Path) -> None:
    path = keys_in(tmp_path, f"\n# keys\n  alice {SECRET}\nbob-2@x.y\tk2  running=2 queue=0   priority=-1\n")
    alice, bob = Keys(path, KeyLimits(7, 9)).owner(bearer(SECRET)), Keys(path).owner(bearer("k2"))
    assert (alice.name, alice.limits, alice.priority) == ("alice", KeyLimits(7, 9), 0)
    assert (bob.name, bob.limits, bob.priority) == ("bob-2@x.y", KeyLimits(2, 0), -1)


def test_without_a_file_everybody_is_nobody_in_particular() -> None:
    assert Keys().owner(bearer("whatever")) is Keys().owner([]) is ANONYMOUS


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", None),
        ("# only\n", None),
        ("alice\n", 1),
        (f"alice {SECRET} running=0", 1),
        (f"alice {SECRET} running=x", 1),
        (f"alice {SECRET} queue=-1", 1),
        (f"alice {SECRET} limit=1", 1),
        (f"alice {SECRET} queue=1 queue=2", 1),
        (f"alice {SECRET}\nalice other", 2),
        (f"alice {SECRET}\nbob {SECRET}", 2),
        (f"../alice {SECRET}", 1),
        (f"{'a' * 65} {SECRET}", 1),
        (f"alice {SECRET}\xe9", 1),
        (f"alice {SECRET} extra", 1),
        (f"a\x1bb {SECRET}", 1),
    ],
)
def test_a_bad_file_is_one_line_that_names_the_line_and_shows_no_key(
    tmp_path: Path, text: str, line: int | None
) -> None:
    path = keys_in(tmp_path, text)
    with pytest.raises(ValueError) as error:
        read_keys(path)
    said = str(error.value)
    assert said.startswith(f"{path}: line {line}: " if line else f"{path}: ") and "\n" not in said
    assert SECRET not in said and SECRET not in repr(error.value.__context__)


def test_a_file_that_is_no_file_of_keys_is_refused_soon() -> None:
    with pytest.raises(ValueError, match="at most"):
        read_keys(Path("/dev/zero"))


def test_every_key_is_compared_whatever_came(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = Keys(keys_in(tmp_path, "a k-a\nb k-b\nc k-c\n"))
    compared: list[tuple[bytes, bytes]] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return one == other

    monkeypatch.setattr(hmac, "compare_digest", compare)
    for secret in ("k-a", "k-c", "k-", "x", "\xe9" * 50):
        compared.clear()
        try:
            keys.owner(bearer(secret))
        except ApiError:
            pass
        assert [len(one) for pair in compared for one in pair] == [32] * 6


def test_a_key_shows_itself_nowhere(tmp_path: Path) -> None:
    keys = Keys(keys_in(tmp_path, f"alice {SECRET}\n"))
    key = keys.owner(bearer(SECRET))
    assert SECRET not in repr(key) and "digest" not in repr(key) and SECRET not in repr(vars(keys))


def test_a_file_that_everybody_may_read_is_warned_about(tmp_path: Path) -> None:
    for mode, warned in ((0o600, False), (0o640, False), (0o644, True), (0o602, True)):
        warning = Keys(keys_in(tmp_path, f"alice {SECRET}\n", mode)).warning()
        assert bool(warning) == warned and (not warning or f"{mode:04o}" in warning)


def test_reading_again_takes_what_is_new_or_leaves_all_as_it_was(tmp_path: Path) -> None:
    path = keys_in(tmp_path, f"alice {SECRET}\n")
    keys = Keys(path)
    path.write_text("bob k-b\n")
    keys.reload()
    assert keys.owner(bearer("k-b")).name == "bob"
    with pytest.raises(ApiError):
        keys.owner(bearer(SECRET))
    for broken in ("", "carol\n"):
        path.write_text(broken)
        with pytest.raises(ValueError):
            keys.reload()
        assert keys.owner(bearer("k-b")).name == "bob"
    path.unlink()
    with pytest.raises(OSError):
        keys.reload()
    assert len(keys) == 1
