"""Files for people and services around the code: citation, workflows, forms, the version."""

from __future__ import annotations

import configparser
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

import ifdefense
import ifdefense.cli

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


SCHEMAS = {
    "vendor.github-workflows": WORKFLOWS,
    "vendor.github-issue-forms": [form for form in FORMS if form.stem != "config"],
    "vendor.github-issue-config": [form for form in FORMS if form.stem == "config"],
    "vendor.citation-file-format": [ROOT / "CITATION.cff"],
}


@pytest.mark.parametrize("schema", SCHEMAS)
def test_files_match_their_schemas(schema: str) -> None:
    main = pytest.importorskip("check_jsonschema", reason="needs the schemas of pip install '.[dev]'").main
    assert SCHEMAS[schema]
    result = CliRunner().invoke(main, ["--builtin-schema", schema, *map(str, SCHEMAS[schema])])
    assert result.exit_code == 0, result.output


def steps() -> list[str]:
    jobs = [job for path in WORKFLOWS for job in read(path)["jobs"].values()]
    return [step["run"] for job in jobs for step in job["steps"] if "run" in step]


def test_workflows_run_what_there_is() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    called = {word for run in steps() for word in re.findall(r"\bmake (\w+)", run)}
    assert {"lint", "test", "docs"} <= called <= targets
    markers = re.findall(r"^(\w+):", SETUP["tool:pytest"]["markers"], re.MULTILINE)
    selected = {marker for run in steps() for marker in re.findall(r"pytest -m (\w+)", run)}
    assert selected == set(markers), "tests that the default run leaves out have a job"
    for file in {word for run in steps() for word in re.findall(r"tests/\w+\.py", run)}:
        assert (ROOT / file).is_file(), file


def test_every_stated_python_is_tested() -> None:
    (matrix,) = (
        job["strategy"]["matrix"]["python"]
        for path in WORKFLOWS
        for job in read(path)["jobs"].values()
        if "strategy" in job
    )
    stated = re.findall(r"Python :: (3\.\d+)", SETUP["metadata"]["classifiers"])
    assert matrix == stated
    assert SETUP["options"]["python_requires"] == f">={stated[0]}"


def test_the_hooks_are_those_of_make_lint() -> None:
    hooks = [hook for repo in read(ROOT / ".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    lint = (ROOT / "Makefile").read_text().replace("$(BIN)", ".venv/bin")
    for hook in hooks:
        assert hook["language"] == "system" and {"id", "name", "types"} <= set(hook)
        command = hook["entry"].replace(" --force-exclude", "").replace("ruff format", "ruff format --check")
        assert f"\t{command}" in lint, hook["id"]


def test_the_version_comes_from_the_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "7.8.9" if name == "ifdefense" else "0")
    assert ifdefense.__version__ == "7.8.9"
    assert CliRunner().invoke(ifdefense.cli.main, ["--version"]).output == "ifdefense, version 7.8.9\n"


def test_the_version_stands_once_and_in_the_citation() -> None:
    version = SETUP["metadata"]["version"]
    assert read(ROOT / "CITATION.cff")["version"] == version
    for file in (ROOT / "ifdefense").rglob("*.py"):
        assert f'"{version}"' not in file.read_text(encoding="utf-8"), file


def papers_of(folder: Path) -> set[str]:
    """Identifiers of the papers that the Python files of a package name."""
    text = "\n".join(file.read_text(encoding="utf-8") for file in folder.rglob("*.py"))
    return {f"10.48550/arXiv.{name}" for name in re.findall(r"arxiv\.org/abs/(\d+\.\d+)", text)}


@pytest.mark.parametrize("package", ["ifdefense", "attacks", "classifiers"])
def test_every_paper_that_the_code_names_is_cited(package: str) -> None:
    cited = {one["doi"] for one in read(ROOT / "CITATION.cff")["references"]}
    assert len(papers_of(ROOT / package)) >= 5
    assert papers_of(ROOT / package) <= cited
