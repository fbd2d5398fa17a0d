"""What was spent at a provider: it is known after a restart, and a file that is none is refused."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest

from qwen3c.serve.budget import Budget

DAY, NEXT = datetime(2026, 12, 1, 12), datetime(2026, 12, 2, 0, 0, 1)


def test_what_was_spent_is_known_after_a_restart_until_midnight(tmp_path: Path) -> None:
    file = tmp_path / "spent"
    budget = Budget(2, 100, lambda: DAY, file)
    budget.add(1, 0)
    budget.add(0, 60)
    budget.close()
    again = Budget(2, 100, lambda: DAY, file)
    assert not again.is_spent
    again.add(0, 40)
    assert again.is_spent
    again.close()
    assert Budget(2, 100, lambda: DAY, file).is_spent
    assert not Budget(2, 100, lambda: NEXT, file).is_spent
    assert not Budget(2, 100, lambda: DAY, file).is_spent, "yesterday's is forgotten"


def test_without_a_file_nothing_is_kept(tmp_path: Path) -> None:
    budget = Budget(1, None, lambda: DAY)
    budget.add(1, 0)
    budget.close()
    assert budget.is_spent and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "null", '{"day": 1, "requests": 0, "tokens": 0}', "\x00", "[" * 100_000,
             '{"day": "2026-12-01", "requests": -1, "tokens": 0}',
             '{"day": "2026-12-01", "requests": "1", "tokens": 0}'],
)  # fmt: skip
def test_a_file_that_is_none_is_refused_and_kept(tmp_path: Path, text: str) -> None:
    file = tmp_path / "spent"
    file.write_text(text)
    with pytest.raises(ValueError, match="spent: not a file of what was spent"):
        Budget(1, 1, lambda: DAY, file)
    assert file.read_text() == text


def test_a_place_where_nothing_can_be_written_is_known_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        Budget(1, 1, lambda: DAY, tmp_path / "none" / "spent")
