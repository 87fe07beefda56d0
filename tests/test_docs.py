"""The documentation: tables are up to date and examples run."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from conftest import sample_box
from torch import Tensor, nn

import attacks
import benchmarks.cli
import classifiers.train
import ifdefense.cli
from attacks.base import Attack, ThreatModel
from attacks.oracle import Oracle
from benchmarks import catalogue, result_files, tables
from classifiers import fold

ROOT = Path(__file__).parent.parent
CARDS = sorted([*ROOT.glob("*/weights/*.md")])


def example(document: str) -> str:
    """The last Python block of a document."""
    text = (ROOT / document).read_text(encoding="utf-8")
    block: str = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[-1]
    return block


@pytest.mark.parametrize("document", tables.DOCUMENTS)
def test_tables_are_up_to_date(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    assert tables.fill(text, ROOT / result_files.FOLDER) == text, "run python -m benchmarks.tables"


def test_the_lines_of_the_readme_run() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    points = torch.rand(3, 300, 3, generator=torch.Generator().manual_seed(0))
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(900, 5))
    space: dict[str, Any] = {"points": points, "classifier": classifier}
    exec("\n".join(blocks), space)
    assert space["clean"].shape == points.shape
    assert space["model"](points).shape == (3, 5)


def test_every_attack_names_its_source() -> None:
    assert len(catalogue.methods()) >= 20
    for name, value in catalogue.methods().items():
        assert catalogue.sources(value), name


def test_the_attack_of_the_example_is_one() -> None:
    space: dict[str, Any] = {"dataclass": dataclass, "torch": torch, "Tensor": Tensor}
    space |= {"Attack": Attack, "Oracle": Oracle, "ThreatModel": ThreatModel, "__name__": __name__}
    exec(compile(example("docs/attacks.md"), "attacks.md", "exec"), space)
    points = torch.randn(3, 40, 3, generator=torch.Generator().manual_seed(0))
    points[1, 0] = 0
    victim = nn.Sequential(nn.Flatten(), nn.Linear(120, 4))
    result = space["Shrink"](epsilon=0.1)(victim, points, torch.zeros(3, dtype=torch.long))
    assert isinstance(result, attacks.AttackResult)
    torch.testing.assert_close(result.distances["point-l2"], torch.full((3,), 0.1))


def test_the_classifier_of_the_example_folds() -> None:
    space: dict[str, Any] = {"nn": nn, "Tensor": Tensor, "__name__": __name__}
    exec(example("docs/classifiers.md"), space)
    model = space["Small"](5).eval()
    model.bn1.running_mean.uniform_(-1, 1)
    model.bn1.running_var.uniform_(0.5, 2)
    points = torch.randn(2, 30, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(fold(model)(points), model(points))


def test_the_loop_of_the_example_trains_the_classifier_alone() -> None:
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(256 * 3, 5))
    start = classifier[1].weight.detach().clone()
    points = torch.from_numpy(sample_box((1.0, 0.6, 0.4), 512, np.random.default_rng(1)))[None]
    space: dict[str, Any] = {"classifier": classifier, "batches": [(points, torch.tensor([2]))]}
    exec(example("docs/integration.md"), space)
    assert space["predicted"].shape == (1,) and not torch.equal(classifier[1].weight, start)
    assert all(weight.grad is None for weight in space["purifier"].parameters())


def parse(command: str) -> None:
    """Parses a command line with the real command's options, without running it."""
    words = shlex.split(command)
    groups = {"ifdefense": ifdefense.cli.main, "ifdefense-bench": benchmarks.cli.main}
    if words[:2] == ["python", "-m"]:
        assert words[2] == "classifiers.train", words[2]
        found, rest = classifiers.train.main, words[3:]
    else:
        found, rest = groups[words[0]], words[1:]
    while isinstance(found, click.Group):
        name, *rest = rest
        context = click.Context(found)
        found = found.get_command(context, name)
        assert found is not None, f"there is no command {name}"
    context = click.Context(found)
    values, left, _ = found.make_parser(context).parse_args(rest)
    assert not left, left
    for option in found.params:
        # Files need not be there: a run before this one writes them.
        if option.name in values and not isinstance(option.type, click.Path):
            option.type_cast_value(context, values[option.name])


COMMAND = re.compile(r"`((?:ifdefense train|ifdefense-bench|python -m) [^`]*)`")


def commands_of(card: Path) -> list[str]:
    return [" ".join(match.split()) for match in COMMAND.findall(card.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.stem)
def test_the_commands_of_a_model_card_can_be_called(card: Path) -> None:
    commands = [command for command in commands_of(card) if "--" in command]
    # The network of the default was trained by a script; its card names the runs that correspond to it.
    assert commands or "`make weights`" in card.read_text(encoding="utf-8")
    for command in commands:
        parse(command)


def test_a_command_with_an_option_that_does_not_exist_is_noticed() -> None:
    with pytest.raises(click.UsageError, match="--rate"):
        parse("python -m classifiers.train --rate 1e-3")
    with pytest.raises(click.BadParameter, match="soon"):
        parse("ifdefense train autoencoder --epochs soon")


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_the_commands_of_make_weights_can_be_called() -> None:
    dry = subprocess.run(
        ["make", "--no-print-directory", "--file", "weights.mk", "--dry-run"],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith("MAKE")},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = dry.stdout.replace("\\\n", " ").splitlines()
    commands = [" ".join(line.removeprefix(".venv/bin/").split()) for line in lines]
    written = " ".join(commands)
    for card in CARDS:
        assert f"{card.stem}.safetensors" in written, f"no run writes {card.stem}"
    for command in commands:
        parse(command)
