"""The wheel is complete: installed alone, it runs the demo."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("ifdefense", "attacks", "classifiers", "benchmarks")


def run(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    arguments = [str(part) for part in command]
    result = subprocess.run(arguments, cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{command}\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
    return result.stdout


def copy_sources(target: Path) -> None:
    """Copies what a wheel is built from: no old build folder gets in, and no new one into the checkout."""
    for name in PACKAGES:
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_demo_runs_from_an_installed_wheel(tmp_path: Path) -> None:
    pip = ("-m", "pip")
    copy_sources(tmp_path / "source")
    run(sys.executable, *pip, "wheel", "-q", "--no-deps", "-w", tmp_path, tmp_path / "source", cwd=tmp_path)
    (wheel,) = tmp_path.glob("ifdefense-*.whl")
    run(sys.executable, "-m", "venv", "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    run(python, *pip, "install", "-q", "--constraint", ROOT / "constraints.txt", wheel, cwd=tmp_path)

    installed = run(python, "-c", "import ifdefense; print(ifdefense.__file__)", cwd=tmp_path)
    assert Path(installed.strip()).is_relative_to(tmp_path / "venv")
    page = "from benchmarks import cards, report; cards.schema(); report.page(report.leaderboard([]))"
    run(python, "-c", page, cwd=tmp_path)
    table = run(python.parent / "ifdefense-bench", "demo", "--quick", "--output", "demo", cwd=tmp_path)
    assert "onet-mesh" in table
    figures = json.loads((tmp_path / "demo" / "demo.json").read_text())["Accuracy, %"]
    rows = {row["attack"]: row for row in figures}
    # The strongest attack breaks the classifier, and the defence gives most of it back.
    assert float(rows["clean"]["none"]) >= 85
    assert float(rows["PGD"]["none"]) <= 30
    assert float(rows["PGD"]["local-mesh"]) >= float(rows["PGD"]["none"]) + 30
    assert len(rows["PGD"]) == 2 + 6, "the attack, no defence and six defences"
    assert (tmp_path / "demo" / "report.html").stat().st_size > 10_000
    assert (tmp_path / "demo" / "demo.png").stat().st_size > 10_000
