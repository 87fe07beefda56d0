"""Files of results, and the cards of the leaderboard in `benchmarks/entries/`, one per defence.

A card says who made a defence and what it needs, and holds its results: those of `benchmarks.evaluate`, with
the cells and figures of this defence only, and without the outcome of every cloud. Its format is
``entries/schema.json``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

FORMAT = 1
"""Version of results and cards."""

ABOUT = ("authors", "link", "venue", "needs", "measured_by")
"""What a card says besides the results."""

BASELINE = "sor-smooth"
"""The defence that others are compared with, cloud by cloud."""

ALL = "all"
"""Family of the figures over all attacks."""

ATTACKED = ("clean", "recent", "if-defense")
"""Families of the cells that count for them; corruptions and clouds of files do not."""

Result = dict[str, Any]
Card = dict[str, Any]

_OF_RESULT: dict[str, type] = {
    "name": str,
    "row": str,
    "data": dict,
    "defence": dict,
    "suite": str,
    "figures": list,
    "cells": list,
    "flags": list,
}
_OF_ROWS = {
    "figures": ("victim", "defence", "family", "clouds"),
    "cells": ("victim", "defence", "source", "knowledge", "family"),
    "flags": ("name", "says"),
}
_OF_CARD: dict[str, type] = {"name": str, **dict.fromkeys(ABOUT, str), "results": list}
_DROPPED = ("right", "labels_digest")
_KEPT = ("suite", "command", "date", "minutes", "machine", "versions", "data", "victims")


def load_result(path: Path) -> Result:
    """A result of ``ifdefense-bench run`` from its file.

    Raises:
        ValueError: if the file is not one.
    """
    return _checked_result(_read(path), str(path), "result of ifdefense-bench run")


def load_card(path: Path) -> Card:
    """A card from its file.

    Raises:
        ValueError: if the file is not one.
    """
    card = _checked(_read(path), str(path), "card", _OF_CARD)
    for result in card["results"]:
        _checked_result(result, str(path), "card")
    return card


def load_all() -> list[Card]:
    """The cards of this package, by name.

    Raises:
        ValueError: if one of them is not a card.
    """
    folder = resources.files("benchmarks") / "entries"
    names = sorted(entry.name for entry in folder.iterdir())
    paths = [Path(str(folder / name)) for name in names if name.endswith(".json") and name != "schema.json"]
    return [load_card(path) for path in paths]


def schema() -> dict[str, Any]:
    """The JSON schema of cards."""
    text = (resources.files("benchmarks") / "entries" / "schema.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def file_name(name: str) -> str:
    """Name of the file of a defence's card.

    Raises:
        ValueError: if the name has no letter or digit.
    """
    words = re.findall(r"[a-z0-9]+", name.lower())
    if not words:
        raise ValueError(f"a card cannot be called {name!r}: it needs a letter or a digit")
    return f"{'-'.join(words)}.json"


def make(results: Sequence[Result], row: str, about: Mapping[str, str]) -> Card:
    """A card.

    Args:
        results: that measured the defence, at least one, at most one for each data set and suite.
        row: the defence in the results.
        about: values of `ABOUT`.

    Raises:
        ValueError: if a result has no figures of the defence.
    """
    kept = [trimmed(result, row) for result in results]
    return {"format": FORMAT, "name": kept[0]["name"], **{key: about[key] for key in ABOUT}, "results": kept}


def name_of(result: Result, row: str) -> str:
    """Name of a defence of a result; that of a model that contains its defence is the model's."""
    return str(result["name"] if row == result["row"] else row)


def trimmed(result: Result, row: str) -> Result:
    """The part of a result that a card keeps of one of its defences.

    Raises:
        ValueError: if there are no figures of the defence.
    """
    figures = [figure for figure in result["figures"] if figure["defence"] == row]
    if not figures:
        found = ", ".join(dict.fromkeys(figure["defence"] for figure in result["figures"]))
        raise ValueError(f"the result has no figures of {row!r}, but of: {found}")
    own = {key: value for key, value in result["defence"].items() if key != "spec"}
    return {
        "format": FORMAT,
        "name": name_of(result, row),
        "row": row,
        **{key: result[key] for key in _KEPT if key in result},
        "defence": own if row == result["row"] else {},
        "figures": figures,
        "differences": [each for each in differences(result) if each["defence"] == row],
        "cells": [
            {key: value for key, value in cell.items() if key not in _DROPPED}
            for cell in result["cells"]
            if cell["defence"] == row
        ],
        "flags": [flag for flag in result["flags"] if flag.get("defence", result["row"]) == row],
        "certified": list(result.get("certified", ())) if row == result["row"] else [],
    }


def differences(result: Result) -> list[dict[str, Any]]:
    """What each defence is ahead of `BASELINE` in the worst case per cloud, with a 95% interval.

    Returns:
        ``victim``, ``family``, ``defence``, ``against``, ``clouds``, ``difference``, ``low`` and ``high``,
        for each: those of the card, or from the clouds of the result.
    """
    if any("right" not in cell for cell in result["cells"]):
        return list(result.get("differences", ()))
    return [*_differences(result)]


def _differences(result: Result) -> Iterator[dict[str, Any]]:
    from benchmarks.statistics import paired

    for row in result["figures"]:
        if row["defence"] == BASELINE or row.get("worst") is None:
            continue
        where = {key: row[key] for key in ("victim", "family")}
        mine, other = (_worst(result, **where, defence=name) for name in (row["defence"], BASELINE))
        if mine is not None and other is not None:
            count = min(mine.shape[1], other.shape[1])
            change = paired(mine[:, :count], other[:, :count])
            yield {**where, "defence": row["defence"], "against": BASELINE, "clouds": count, **change}


def _worst(result: Result, victim: str, family: str, defence: str) -> Any:
    """``(D, S)`` whether each cloud is correct in all cells of a row; of the clouds that all cells have."""
    from benchmarks.statistics import unpacked, worst

    families = ATTACKED if family == ALL else ("clean", family)
    found = [
        unpacked(cell["right"])
        for cell in result["cells"]
        if (cell["victim"], cell["defence"]) == (victim, defence) and cell["family"] in families
    ]
    count = min((right.shape[1] for right in found), default=0)
    return worst([right[:, :count] for right in found]) if count else None


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no figure")


def _checked_result(content: Any, where: str, what: str) -> Result:
    result = _checked(content, where, what, _OF_RESULT)
    for part, keys in _OF_ROWS.items():
        for number, row in enumerate(result[part]):
            missing = [key for key in keys if not isinstance(row, dict) or key not in row]
            if missing:
                raise ValueError(f"{where} is not a {what}: {part}[{number}] has no {missing[0]!r}")
    return result


def _checked(content: Any, where: str, what: str, needed: Mapping[str, type]) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ValueError(f"{where} is not a {what}")
    if content.get("format") != FORMAT:
        raise ValueError(f"{where} has format {content.get('format')!r}; this version reads format {FORMAT}")
    for key, kind in needed.items():
        if not isinstance(content.get(key), kind):
            raise ValueError(f"{where} is not a {what}: {key!r} is missing or no {kind.__name__}")
    return content
