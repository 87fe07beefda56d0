"""Writes the card of a defence for the leaderboard: ``ifdefense-bench submit``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from benchmarks import cards, result_files

_HELP = {
    "authors": "Who made the defence.",
    "link": "Address of the paper or the code.",
    "venue": "Where it was published.",
    "needs": "What it needs: weights, data, packages, hardware.",
    "measured_by": "Who ran this command.",
}
_MAY_BE_EMPTY = ("link", "venue")


def _about(command: Any) -> Any:
    for key in reversed(cards.ABOUT):
        command = click.option(f"--{key.replace('_', '-')}", metavar="TEXT", help=_HELP[key])(command)
    return command


@click.command()
@click.argument("defence")
@click.option(
    "--result",
    "path",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Take the figures from a result of `run` that measured DEFENCE, instead of measuring.",
)
@click.option("--suite", default="quick", show_default=True)
@click.option("--data", default="procedural", show_default=True)
@click.option("--victim", "victims", metavar="NAME", multiple=True, help="As in `run`; repeatable.")
@click.option(
    "--store",
    type=click.Path(path_type=Path),
    default=Path("cache/bench"),
    show_default=True,
    help="Folder of finished shards, shared with `run`.",
)
@_about
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(),
    help="Folder of the card, such as benchmarks/entries.  [default: .]",
)
@click.option("--force", is_flag=True, help="Replace figures of the same data and suite in the card.")
def submit(
    defence: str,
    path: Path | None,
    suite: str,
    data: str,
    victims: tuple[str, ...],
    store: Path,
    output: Path,
    force: bool,
    **about: str | None,
) -> None:
    """Measures DEFENCE, named as in `run`, and writes its card.

    A card that is there keeps its figures of other data and suites, and what it says about the defence unless
    given anew.
    """
    try:
        if path is None:
            _said(about, _card(output, defence.rpartition(":")[2]))  # an error now, not after the measurement
            result = _measured(defence, suite, data, victims, store)
        else:
            result = cards.load_result(path)
        click.echo(f"written to {write(result, defence, about, output, force=force)}")
    except ValueError as error:
        raise click.ClickException(str(error)) from None


def write(
    result: cards.Result,
    defence: str,
    about: Mapping[str, str | None],
    output: Path,
    *,
    force: bool = False,
) -> Path:
    """Writes or extends a card.

    Args:
        result: a result that measured the defence.
        defence: its name in the result, or the name by which `run` was given the defence of the result.
        about: values of `cards.ABOUT`; where ``None``, those of the card that is there.
        output: folder.
        force: replace figures of the same data and suite.

    Raises:
        ValueError: if the result measured another defence, something is missing, or there are such figures
            without ``force``.
    """
    rows = {figures["defence"] for figures in result["figures"]}
    row = defence if defence in rows else result["row"]
    spec = str(result["defence"].get("spec", ""))
    known = {result["row"], result["name"], spec, spec.rpartition(":")[2]} - {""}
    if defence not in rows and known.isdisjoint((defence, defence.rpartition(":")[2])):
        raise ValueError(f"the result measured {result['row']!r}, not {defence!r}")
    name = cards.name_of(result, row)
    path, old = output / cards.file_name(name), _card(output, name)
    card = cards.make([result], row, _said(about, old))
    for each in () if old is None else old["results"]:
        if (each["data"]["name"], each["suite"]) != (result["data"]["name"], result["suite"]):
            card["results"].append(each)
        elif not force:
            what = f"{each['data']['name']}, {each['suite']}"
            raise ValueError(f"{path} has figures of {what} already; --force replaces them")
    result_files.write_json(path, card)
    return path


def _card(folder: Path, name: str) -> cards.Card | None:
    path = folder / cards.file_name(name)
    return cards.load_card(path) if path.exists() else None


def _said(about: Mapping[str, str | None], old: cards.Card | None) -> dict[str, str]:
    """What a card says: as given, else as before."""
    said = {}
    for key in cards.ABOUT:
        value = about.get(key)
        said[key] = str(value if value is not None else (old or {}).get(key, ""))
        if not said[key] and key not in _MAY_BE_EMPTY:
            what = _HELP[key][0].lower() + _HELP[key][1:-1]
            raise ValueError(f"a card says {what}: give --{key.replace('_', '-')}")
    return said


def _measured(defence: str, suite: str, data: str, victims: tuple[str, ...], store: Path) -> cards.Result:
    from benchmarks import evaluate
    from benchmarks.run import exit_codes

    with exit_codes():
        result = evaluate(
            defence=defence,
            victim=victims or None,
            data=data,
            suite=suite,
            store=store,
            progress=sys.stderr.isatty(),
        )
    if result.failures:
        raise click.ClickException(f"not all was measured: {result.failures[0]}")
    options = ["--defence", defence, "--suite", suite, "--data", data]
    options += [word for victim in victims for word in ("--victim", victim)]
    measured: cards.Result = result.data
    return measured | {"command": shlex.join(["ifdefense-bench", "run", *options])}
