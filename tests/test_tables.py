"""benchmarks/tables.py: documents say what the benchmark measured, and nothing else.

python -m pytest tests/test_tables.py
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from small_models import write_small_model

ROOT = Path(__file__).parents[1]
PAGE = "# Speed\n\n<!-- speed 0.6B -->\nstale\n<!-- end -->\n\nrest\n"
README = "# qwen3c\n\n<!-- speed line -->\n<!-- end -->\n\nuse\n"


def load(name: str) -> ModuleType:
    """A script of benchmarks/ as a module."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", ROOT / f"benchmarks/{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tables = load("tables")


def result(engine: str, test: str, rate: float, seconds: list[float], **more: Any) -> dict[str, Any]:
    """A report as bench.py writes it, without the parts that tables.py does not read."""
    fields = {
        "kind": test[:2],
        "n": int(test[2:].split("@")[0]),
        "depth": 0,
        "batch": 1,
        "tokens_per_second": rate,
    }
    return {"engine": engine, "test": test, "seconds": seconds, **fields, **more}


def report() -> dict[str, Any]:
    results = [
        result("qwen3c", "pp512", 1159.6, [1.0, 1.0, 2.0], share_of_limit=0.514),
        result("llama.cpp", "pp512", 269.4, [4.0, 4.5, 8.2]),
        result("qwen3c", "tg64", 70.06, [1.0, 1.0, 1.0], share_of_limit=0.93),
        result("llama.cpp", "tg64", 55.0, [1.2, 1.3, 1.7]),
        result("qwen3c", "tg64@8192x4", 6.454, [1.0], depth=8192, batch=4, share_of_limit=1.0),
    ]  # fmt: skip
    load = [
        {"what": "first token", "engine": "qwen3c", "unit": "s", "values": [0.15, 0.14, 0.19]},
        {"what": "first token", "engine": "llama.cpp", "unit": "s", "values": [0.49]},
    ]
    return {
        "date": "2001-02-03", "command": "python benchmarks/bench.py --pairs 3",
        "machine": {"cpu": "Some CPU", "isa": "avx2", "load": 0.5},
        "model": {"name": "random-0.6B", "bytes": 1, "parameters": 596_000_000, "group_size": 64},
        "races": [
            {"threads": 2, "kv": "f16", "engines": {"qwen3c": "int8", "llama.cpp": "0.3.36, Q8_0"},
             "results": results, "figures": load, "verdict": "quiet enough to judge"},
        ],
        "figures": [{"what": "export", "engine": "qwen3c", "unit": "GB a second", "values": [0.5]}],
    }  # fmt: skip


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A root with both documents and the figures of 0.6B."""
    (tmp_path / "docs/speed").mkdir(parents=True)
    (tmp_path / "docs/SPEED.md").write_text(PAGE)
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "docs/speed/0.6B.json").write_text(json.dumps(report()))
    return tmp_path


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_a_table_says_where_when_how_and_every_rate_with_its_ratio_pair_by_pair(project: Path) -> None:
    assert tables.main(["--root", str(project)]) == 0
    page = lines(project / "docs/SPEED.md")
    assert page[0] == "# Speed" and page[-1] == "rest" and "stale" not in page
    assert "random-0.6B, 596 M parameters, groups of 64; Some CPU, avx2; 2001-02-03:" in page
    assert "    python benchmarks/bench.py --pairs 3" in page and "- llama.cpp: 0.3.36, Q8_0" in page
    first = page.index("| | qwen3c | of the limit | llama.cpp |")
    assert page[first + 1 : first + 6] == [
        "|---|---|---|---|",
        "| prefill of 512 | 1,160 | 51% | 269 (4.10, 4.00 to 4.50) |",
        "| decode | 70.1 | 93% | 55.0 (1.30, 1.20 to 1.70) |",
        "| decode at position 8,192, 4 sessions together | 6.45 | 100% | |",
        "| first token, s | 0.15 | | 0.49 |",
    ]
    assert "| export, GB a second | 0.5 |" in page
    assert "The benchmark's own verdict: quiet enough to judge." in page


def test_the_line_has_the_rates_of_the_table(project: Path) -> None:
    tables.main(["--root", str(project)])
    _, _, _, said, *_ = lines(project / "README.md")
    assert said == (
        "Speed, on 2 cores of Some CPU, 0.6B parameters, 2001-02-03: prefill of 512 at 1,160 tok/s (4.1 "
        "times llama.cpp); "
        "decode at 70.1 tok/s (1.3 times llama.cpp). [Every figure, and how it was measured](docs/SPEED.md)."
    )


def test_check_finds_a_document_that_the_figures_contradict(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check = ["--check", "--root", str(project)]
    assert tables.main(check) == 1 and lines(project / "README.md") == README.splitlines()
    assert capsys.readouterr().err.splitlines() == [
        "docs/SPEED.md: not what the figures say", "README.md: not what the figures say",
    ]  # fmt: skip
    tables.main(["--root", str(project)])
    capsys.readouterr()
    assert tables.main(check) == 0 and not capsys.readouterr().err
    page = project / "docs/SPEED.md"
    page.write_text(page.read_text().replace("1,160", "1,300"))
    assert tables.main(check) == 1


def test_figures_that_are_missing_are_one_line_and_leave_the_place_as_it_is(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "docs/speed/0.6B.json").unlink()
    assert tables.main(["--root", str(project)]) == 1
    assert capsys.readouterr().err == "docs/speed/0.6B.json is missing: bench.py --json writes it\n"
    assert (project / "docs/SPEED.md").read_text() == PAGE and (project / "README.md").read_text() == README


def test_what_bench_writes_is_what_tables_read(project: Path, tmp_path: Path) -> None:
    write_small_model(tmp_path / "source")
    target = project / "docs/speed/0.6B.json"
    command = [
        "benchmarks/bench.py",
        str(tmp_path / "source"),
        "--tests",
        "pp,tg,batch,mixed,export,sampler,load",
    ]
    command += ["--pairs", "1", "--prompts", "9", "--decode", "4", "--batches", "2", "--json", str(target)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=True, capture_output=True)
    measured = json.loads(target.read_text())
    assert measured["command"] == f"python {' '.join(command[:-2])}"
    assert tables.main(["--root", str(project)]) == 0
    page = lines(project / "docs/SPEED.md")
    told = {line.split("|")[1].strip() for line in page if line.startswith("|")}
    assert {"prefill of 9", "decode", "decode, the whole token loop", "decode, 2 sessions together"} <= told
    assert {"export, GB of source a second", "sampler, greedy, ms", "first token, ids to id, s"} <= told
    assert f"    {measured['command']}" in page and measured["date"] in lines(project / "README.md")[3]


def test_the_documents_of_this_project_say_what_its_figures_say(capsys: pytest.CaptureFixture[str]) -> None:
    """Places without measured figures stay empty."""
    figures = {path.stem: json.loads(path.read_text()) for path in ROOT.glob("docs/speed/*.json")}
    named: set[str] = set()
    for document in tables.DOCUMENTS:
        text = (ROOT / document).read_text()
        named |= {name for _, name, _ in tables.PLACE.findall(text)}
        assert tables.filled(text, figures) == text, f"{document}: run benchmarks/tables.py"
        absent = tables.missing(text, figures)
        for place in tables.PLACE.finditer(text):
            if {place[2], tables.LINE_FROM} & set(absent):
                assert place[0] == place[1] + place[3], f"{document} has figures of its own"
    assert named >= {tables.LINE, tables.LINE_FROM} and figures.keys() <= named
