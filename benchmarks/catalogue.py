"""Tables of `docs/attacks.md` and `docs/classifiers.md`, generated from the classes."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re
from pathlib import Path

import attacks
import classifiers
from benchmarks.published import accuracy
from benchmarks.text_tables import markdown
from classifiers import NETWORKS, build

SOURCE = re.compile(r"<(https://(?:arxiv\.org|doi\.org|github\.com)/[^>]+)>")


def methods() -> dict[str, type[attacks.Attack]]:
    """Attacks that do not wrap other attacks, by name."""
    found = {name: getattr(attacks, name) for name in sorted(attacks.__all__, key=str.lower)}
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, type) and issubclass(value, attacks.Attack) and _has_defaults(value)
    }


def _has_defaults(value: type) -> bool:
    fields = dataclasses.fields(value) if dataclasses.is_dataclass(value) else []
    missing = dataclasses.MISSING
    return bool(fields) and all(
        field.default is not missing or field.default_factory is not missing for field in fields
    )


def sources(value: type) -> list[str]:
    """Links of a docstring in order; those of the base class if there are none."""
    for cls in value.__mro__:
        links = SOURCE.findall(cls.__doc__ or "")
        if links:
            return list(dict.fromkeys(links))
    return []


def _link(address: str) -> str:
    place = address.split("//")[1]
    name = "arXiv:" + place.split("/")[-1] if place.startswith("arxiv") else place.partition("/")[0]
    return f"[{name}]({address})"


def _first_line(value: type) -> str:
    return (value.__doc__ or "").strip().split("\n")[0].rstrip(".")


def threat_models() -> str:
    """Threat model of each attack."""
    rows = []
    for name, value in methods().items():
        threat = value().threat
        if threat.changes == "shift":
            budget = (
                "as small as it can" if threat.epsilon is None else f"{threat.norm} ≤ {threat.epsilon:.3g}"
            )
        else:
            budget = f"{threat.count} points"
        rows.append([f"`{name}`", _first_line(value), threat.knowledge, threat.goal, threat.changes, budget])
    return markdown(["attack", "what it does", "knows", "goal", "changes", "budget"], rows, words=6)


def defaults() -> str:
    """Default settings of each attack and their source."""
    rows = []
    for name, value in methods().items():
        settings = ", ".join(
            f"{field.name} {getattr(value(), field.name)}"
            for field in dataclasses.fields(value)  # type: ignore[arg-type]
            if isinstance(getattr(value(), field.name), int | float | str)
        )
        rows.append([f"`{name}`", settings, ", ".join(_link(address) for address in sources(value))])
    return markdown(["attack", "defaults", "source"], rows, words=3)


@functools.cache
def networks() -> str:
    """The classifiers, their sizes, and the origin of their tensor names."""
    rows = []
    for name, (module, _, _) in NETWORKS.items():
        size = sum(parameter.numel() for parameter in build(name).parameters())
        text = importlib.import_module(module).__doc__ or ""
        names = SOURCE.findall(text)
        kind = text.split("\n")[0].split(": ", 1)[1].rstrip(".")
        row = [f"`{name}`", kind, f"{size / 1e6:.2f} M"]
        rows.append([*row, ", ".join(f"[{link.split('github.com/')[1]}]({link})" for link in names[:1])])
    return markdown(["name", "what it is", "parameters, 40 classes", "tensor names of"], rows, words=4)


def weights() -> str:
    """The shipped classifiers and their accuracies, from their model cards."""
    rows = []
    for card in sorted((Path(classifiers.__file__).parent / "weights").glob("*.md")):
        text = card.read_text(encoding="utf-8")
        row = [f"`{card.stem}`"]
        for measured in ("validation accuracy", "purified accuracy", "test accuracy, measured once"):
            found = re.search(rf"^\* {measured}: ([\d.]+)%", text, re.MULTILINE)
            row.append("–" if found is None else found[1])
        mark = None if "procedural" in card.stem else accuracy(card.stem, "none", "none")
        rows.append([*row, "–" if mark is None else f"{mark:.2f}"])
    header = ["name", "validation", "validation, purified", "test", "published (IF-Defense)"]
    return markdown(header, rows)
