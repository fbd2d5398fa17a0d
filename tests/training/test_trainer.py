from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from nano import NANO, train, write_text

from qwen3c.training.trainer import Settings


def settings(**changes: Any) -> Settings:
    given: dict[str, Any] = {
        "out": Path("x"),
        "steps": 100,
        "batch": 1,
        "micro_batch": 1,
        "learning_rate": 1e-3,
        "warmup": 10,
    }
    return Settings(**(given | changes))


def test_the_learning_rate_rises_in_a_line_and_falls_as_a_cosine() -> None:
    s = settings()
    assert [s.learning_rate_at(i) for i in (0, 4, 9)] == pytest.approx([1e-4, 5e-4, 1e-3])
    assert s.learning_rate_at(55) == pytest.approx(1e-3 * (0.1 + 0.9 / 2))
    assert s.learning_rate_at(100) == pytest.approx(1e-4)
    rates = [s.learning_rate_at(i) for i in range(9, 101)]
    assert rates == sorted(rates, reverse=True)


def test_only_matrices_decay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen3c.training.trainer import Trainer

    seen: list[Trainer] = []
    monkeypatch.setattr(Trainer, "run", lambda self: seen.append(self))
    assert (
        train("pretrain", write_text(tmp_path / "text"), "-o", tmp_path / "out", *NANO, "--weight-decay", 0.3)
        == 0
    )
    for group in seen[0].optimizer.param_groups:
        assert {p.ndim for p in group["params"]} == ({2} if group["weight_decay"] else {1})
    assert [g["weight_decay"] for g in seen[0].optimizer.param_groups] == [0.3, 0.0]
    n = sum(p.numel() for g in seen[0].optimizer.param_groups for p in g["params"])
    assert n == sum(p.numel() for p in seen[0].plain_model.parameters())


def test_accumulated_micro_batches_are_one_batch(tmp_path: Path) -> None:
    from nano import losses

    text = write_text(tmp_path / "text")
    for name, micro in (("whole", 8), ("parts", 2)):
        assert (
            train(
                "pretrain",
                text,
                "-o",
                tmp_path / name,
                *NANO,
                "--steps",
                5,
                "--micro-batch",
                micro,
                "--quiet",
            )
            == 0
        )
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


def test_bfloat16_trains_close_to_float32(tmp_path: Path) -> None:
    from nano import losses

    text = write_text(tmp_path / "text")
    for precision in ("fp32", "bf16"):
        out = tmp_path / precision
        assert (
            train(
                "pretrain",
                text,
                "-o",
                out,
                *NANO,
                "--steps",
                5,
                "--precision",
                precision,
                "--batch",
                2,
                "--quiet",
            )
            == 0
        )
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "fp32"), rel=1e-2)
    assert losses(tmp_path / "bf16") != losses(tmp_path / "fp32")
