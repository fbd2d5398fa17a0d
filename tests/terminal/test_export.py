"""export.py as a person types it: the bar drawn, on any terminal, at any speed, interrupted, resized, closed.

python -m pytest tests/terminal/test_export.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from screen import ROOT, run_typed
from small_models import write_small_model

EXPORT = [sys.executable, str(ROOT / "export.py")]


@pytest.mark.parametrize("columns", [20, 80])
def test_an_export_typed_on_a_terminal_ends_in_its_report(tmp_path: Path, columns: int) -> None:
    source, target = write_small_model(tmp_path / "model"), tmp_path / "model.bin"
    status, text, _ = run_typed([*EXPORT, source, target], columns=columns)
    assert status == 0 and target.exists(), text
    assert "mlp.down_proj" in text and "Traceback" not in text
