"""``ifdefense-bench run``: measures a defence and writes the result as JSON."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.evaluation import evaluate
from benchmarks.executors import EXECUTORS
from benchmarks.shards import StoreError
from benchmarks.suite import SUITES, WAYS, Knows
from ifdefense.console import device_option
from ifdefense.purifiers.registry import DEFAULT

_POSITIVE = click.IntRange(min=1)
_PATH = click.Path(path_type=Path)


@contextlib.contextmanager
def exit_codes() -> Iterator[None]:
    """Context in which errors of `evaluate` end the command with one line: 1 if writing fails, else 2."""
    try:
        yield
    except StoreError as error:
        raise click.ClickException(str(error)) from None
    except (ValueError, TypeError, ImportError, FileNotFoundError, ConnectionError) as error:
        raise click.UsageError(str(error)) from None


@click.command()
@click.option("--defence", metavar="NAME", help=f"Method, module:NAME or file.py:NAME.  [default: {DEFAULT}]")
@click.option(
    "--victim",
    "victims",
    metavar="NAME",
    multiple=True,
    help="Shipped classifier, module:NAME, file.py:NAME or NETWORK:FILE; repeatable.",
)
@click.option("--model", metavar="NAME", help="A classifier that contains its defence.")
@click.option("--data", metavar="NAME", help="Data set, folder or file.  [default: procedural]")
@click.option("--attacked", type=_PATH, help="Score on this file of attacked clouds instead of attacking.")
@click.option("--suite", type=click.Choice(list(SUITES)), default="quick", show_default=True)
@click.option(
    "--attack", "attacks", metavar="NAME", multiple=True, help="Only this attack of the suite; repeatable."
)
@click.option(
    "--static",
    "knowledge",
    flag_value="static",
    default=None,
    help="Only attacks that do not know the defence.",
)
@click.option("--adaptive", "knowledge", flag_value="adaptive", help="Only attacks that know the defence.")
@click.option(
    "--way",
    "ways",
    type=click.Choice(WAYS),
    multiple=True,
    help="Only this way through the defence in adaptive attacks; repeatable.",
)
@click.option(
    "--samples",
    type=_POSITIVE,
    help="Draws per gradient of a random defence, instead of the suite's number.",
)
@click.option("--clouds", type=_POSITIVE, help="Clouds of every cell, instead of the suite's numbers.")
@click.option(
    "--minutes",
    type=click.FloatRange(min=0, min_open=True),
    help="Time to spend, instead of a number of clouds.",
)
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True)
@click.option(
    "--store", type=_PATH, default=Path("cache/bench"), show_default=True, help="Folder of finished shards."
)
@click.option("--executor", type=click.Choice(list(EXECUTORS)), default="serial", show_default=True)
@click.option(
    "--certified",
    "certificates",
    is_flag=True,
    help="Adds the certificates of a vote around each victim.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="JSON to write.  [default: SUITE-NAME.json]",
)
@device_option
def run(
    defence: str | None,
    victims: tuple[str, ...],
    model: str | None,
    suite: str,
    attacks: tuple[str, ...],
    knowledge: Knows | None,
    ways: tuple[str, ...],
    samples: int | None,
    device: torch.device,
    out: Path | None,
    **options: Any,
) -> None:
    """Measures a defence under static and adaptive attacks.

    An interrupted run resumes from its store. Exit codes: 0 if all was measured, 1 if some of it failed, 2
    for an invalid call.
    """
    with exit_codes():
        chosen = SUITES[suite].only(attacks, knowledge, ways)
        if samples is not None:
            chosen = dataclasses.replace(chosen, samples=samples)
        result = evaluate(
            defence=DEFAULT if defence is None and model is None else defence,
            victim=victims or None,
            model=model,
            suite=chosen,
            device=device,
            progress=sys.stderr.isatty(),
            **options,
        )
        result.data["command"] = shlex.join(["ifdefense-bench", *sys.argv[1:]])
        if out is None:
            out = Path(f"{suite}-{re.sub(r'[^A-Za-z0-9_.-]+', '-', result.name)}.json")
        result.to_json(out)
    for failure in result.failures:
        click.echo(f"failed: {failure}", err=True)
    if result.figures:
        click.echo(result.text())
    click.echo(f"written to {out}")
    if result.failures:
        sys.exit(1)
