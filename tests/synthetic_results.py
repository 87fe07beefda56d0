"""Results as `benchmarks.evaluate` writes them, made up: for tests of what reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

VICTIMS = ("pointnet-procedural", "dgcnn-procedural")
FAMILIES = ("all", "recent", "if-defense")
COUNT = 40


def _shift(norm: str, epsilon: float) -> dict[str, Any]:
    return {"changes": "shift", "norm": norm, "epsilon": epsilon, "count": 0}


SOURCES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "apgd-linf": ("APGD-CE, L∞ 0.05", "recent", _shift("linf", 0.05)),
    "pgd-linf": ("PGD, L∞ 0.05", "recent", _shift("linf", 0.05)),
    "apgd-l2": ("APGD-CE, L2 1.25", "recent", _shift("l2", 1.25)),
    "drop-200": ("Drop-200", "recent", {"changes": "drop", "norm": None, "epsilon": None, "count": 200}),
    "square": ("Square, L∞ 0.08", "if-defense", _shift("linf", 0.08)),
    "pgd": ("PGD", "if-defense", _shift("l2", 4.43)),
}
FLAG = {
    "name": "masked-gradients",
    "victim": VICTIMS[0],
    "sources": ["apgd-linf"],
    "share": 0.4,
    "says": "The gradient is zero on 40% of the clouds, so attacks that follow it say little.",
}


def outcomes(accuracy: float, draws: int, salt: int) -> list[str]:
    """One string per draw of which clouds are right: exactly the accuracy in %, rounded to clouds."""
    right = round(min(100.0, max(0.0, accuracy)) * COUNT / 100)
    hardness = np.linspace(0, 1, COUNT)  # some clouds are hard for every defence
    noise = [np.random.default_rng([salt, draw]).normal(0, 0.05, COUNT) for draw in range(draws)]
    ranks = [np.argsort(np.argsort(hardness + each)) for each in noise]
    return ["".join("1" if rank < right else "0" for rank in each) for each in ranks]


def accuracy_of(right: Sequence[str]) -> dict[str, float]:
    """Accuracy in % of outcomes, with a plausible error, and the spread over draws."""
    shares = [100 * text.count("1") / len(text) for text in right]
    mean, spread = float(np.mean(shares)), float(np.std(shares))
    error = (mean * (100 - mean) / len(right[0])) ** 0.5
    return {"accuracy": mean, "error": error, "class_mean": mean, "spread": spread}


def worst_of(rights: Sequence[Sequence[str]]) -> list[str]:
    """Clouds that are right in all outcomes; those of one draw count for every draw of the others."""
    draws = max(map(len, rights))
    full = [list(right) * (draws // len(right)) for right in rights]
    return [
        "".join("1" if {*clouds} == {"1"} else "0" for clouds in zip(*each, strict=True))
        for each in zip(*full, strict=True)
    ]


def cell(victim: str, defence: str, source: str, knowledge: str, accuracy: float) -> dict[str, Any]:
    """A cell of a grid."""
    draws = 3 if defence.endswith("random") else 1
    title, family, budget = SOURCES.get(source, ("clean", "clean", None))
    right = outcomes(accuracy, draws, sum(map(ord, victim + source + knowledge + defence)))
    return {
        "victim": victim,
        "source": source,
        "title": title,
        "family": family,
        "defence": defence,
        "knowledge": knowledge,
        "clouds": COUNT,
        "draws": draws,
        **accuracy_of(right),
        "success": None if source == "clean" else 95.0,
        "budget": budget,
        "settings": f"{title}(steps=20)",
        "passes": 20,
        "milliseconds": 0.0 if defence == "none" else 3.0 * (1 + len(defence)),
        "attack_seconds": 1.0,
        "right": right,
        "labels_digest": "0" * 16,
    }


def _figures(cells: Sequence[Mapping[str, Any]], family: str, static: float) -> dict[str, Any]:
    clean, *attacked = cells
    of = [each for each in attacked if family in ("all", each["family"])]
    adaptive = [each for each in of if each["knowledge"] != "static"] or of
    return {
        "victim": clean["victim"],
        "defence": clean["defence"],
        "family": family,
        "attacks": len(of),
        "clouds": COUNT,
        "clean": accuracy_of(clean["right"]),
        "static": {"accuracy": static, "error": 3.0, "class_mean": static, "spread": 0.0},
        "adaptive": accuracy_of(worst_of([each["right"] for each in adaptive])),
        "worst": accuracy_of(worst_of([each["right"] for each in (clean, *of)])),
    }


def result(
    name: str,
    levels: Mapping[str, float],
    *,
    data: str = "procedural",
    suite: str = "quick",
    victims: Sequence[str] = VICTIMS,
    flags: Sequence[Mapping[str, Any]] = (),
    date: str = "2026-11-30",
    examples: int = 0,
    certified: bool = False,
) -> dict[str, Any]:
    """A result.

    Args:
        name: of the defence.
        levels: accuracy in % under static attacks of each defence; 10 more on clean clouds, 5 fewer
            if adaptive.
        data: name of the data set.
        suite: name of the suite.
        victims: names of the victims.
        flags: raised by the defence.
        date: of the run.
        examples: number of example clouds.
        certified: whether there is a certified curve.
    """
    cells, figures = [], []
    for victim in victims:
        for defence, level in levels.items():
            mine = [cell(victim, defence, "clean", "none", level + 10)]
            known = "eot" if defence.endswith("random") else "straight-through"
            for source in SOURCES:
                mine.append(cell(victim, defence, source, "static", level))
                if defence != "none":
                    mine.append(cell(victim, defence, source, known, level - 5))
            cells += mine
            figures += [_figures(mine, family, level) for family in FAMILIES]
    curve = {
        "victim": victims[0],
        "defence": "voting",
        "removed_or_added": [0, 20, 40, 100, 200],
        "certified": [80.0, 60.0, 40.0, 12.5, 0.0],
        "empirical_add": [80.0, 77.5, 75.0, 70.0, 60.0],
        "empirical_drop": [80.0, 72.5, 70.0, 60.0, 42.5],
    }
    return {
        "format": 1,
        "name": name,
        "row": name,
        "defence": {
            "spec": {"class": f"mine:{name}"},
            "digest": "0123456789abcdef",
            "deterministic": not name.endswith("random"),
            "differentiable": False,
            "optimises": False,
        },
        "data": {"name": data, "clouds": COUNT, "seed": 0, "digest": "fedcba9876543210"},
        "suite": suite,
        "command": f"ifdefense-bench run --defence mine.py:{name}",
        "date": date,
        "machine": {"processor": "a processor", "cores": 2, "threads": 2},
        "versions": {"ifdefense": "0.1.0", "torch": "2.13.0"},
        "minutes": 3.1,
        "victims": {victim: {"weights": "00ff00ff00ff00ff"} for victim in victims},
        "figures": figures,
        "cells": cells,
        "flags": [{"defence": name, **flag} for flag in flags],
        "certified": [curve] if certified else [],
        "examples": [_example(index, victims[0]) for index in range(examples)],
    }


def _example(index: int, victim: str) -> dict[str, Any]:
    generator = np.random.default_rng(index)
    clean = generator.normal(size=(400, 3))
    clean /= np.linalg.norm(clean, axis=1, keepdims=True)
    return {
        "label": "ball",
        "title": "APGD-CE, L∞ 0.05",
        "victim": victim,
        "predicted": {"clean": "ball", "attacked": "cup", "purified": "ball"},
        "clean": clean.round(4).tolist(),
        "attacked": (clean + 0.05 * np.sign(generator.normal(size=(400, 3)))).round(4).tolist(),
        "purified": (0.98 * clean).round(4).tolist(),
    }
