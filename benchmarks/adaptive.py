"""Attackers of increasing knowledge against defences, and the worst of them per cloud.

A plain attack only knows the classifier. The others also know the defence and are computed through it: with
the straight-through gradient or the exact one of a differentiable method, with the seed of the
defence or averaged over random draws (EOT). Results are evaluated on defences with unknown draws: one new
draw, and the mean of several.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

import attacks
from attacks import EOT, Attack, DefenceAware, attack_in_batches
from attacks.defence_aware.model import Gradient
from benchmarks import record
from benchmarks.protocol import (
    DEFENCES,
    NO_DEFENCE,
    Bench,
    Protocol,
    Victim,
    code_of,
    protocol_options,
    purifier_of,
    rate,
    several,
)
from benchmarks.text_tables import markdown, text_table
from ifdefense import Defended
from ifdefense.provenance import digest, versions

DELTA = 0.05
FRESH = 1_000_000
"""First seed of the defences' draws; not used by attackers."""

DRAWS = 8
"""Draws of the averaging defence."""


@dataclasses.dataclass(frozen=True)
class Attacker:
    """Knowledge of an attacker.

    Attributes:
        title: name in tables.
        samples: draws per gradient; 0 for an attacker who does not know the defence.
        fresh: whether draws are random; otherwise the attacker knows the seed of the defence.
        gradient: how gradients pass the defence, see `attacks.BPDA`.
    """

    title: str
    samples: int = 1
    fresh: bool = True
    gradient: Gradient = "nearest"


ATTACKERS = {
    "plain": Attacker("plain", 0),
    "known": Attacker("known seed", fresh=False),
    "exact": Attacker("known seed, exact gradient", fresh=False, gradient="exact"),
    "eot-1": Attacker("a new draw per gradient"),
    "eot-8": Attacker("EOT 8", 8),
    "eot-8-exact": Attacker("EOT 8, exact gradient", 8, gradient="exact"),
    "eot-16": Attacker("EOT 16", 16),
}
"""Attackers by name."""

DEFAULT = ("plain", "known", "exact", "eot-8")


def attacked(
    bench: Bench, victim: Victim, attack: Attack, attacker: Attacker, defence: str, folder: Path
) -> Tensor:
    """``(S, N, 3)`` attacked clouds.

    Args:
        bench: clouds and cache.
        victim: the classifier.
        attack: the attack, on the model given by the attacker's knowledge.
        attacker: knowledge of the attacker.
        defence: the known defence.
        folder: cache.
    """
    model = victim.model
    if attacker.samples and defence != NO_DEFENCE:
        purifier = purifier_of(defence, bench.device)
        first = bench.seed if not attacker.fresh else 1
        model = DefenceAware(
            model,
            purifier,
            gradient=attacker.gradient,
            eot=EOT(attacker.samples, first=first, fresh=attacker.fresh),
            num_points=bench.points.shape[1],
            seed=bench.seed,
        )
    key = digest(attack, model, code_of(model), versions(), bench.kind)
    return attack_in_batches(
        attack,
        model,
        bench.points,
        bench.labels,
        batch_size=bench.batch,
        folder=folder / key,
        seed=bench.seed,
        progress=True,
    ).points


@torch.no_grad()
def correct(bench: Bench, victim: Victim, points: Tensor, defence: str) -> dict[str, Tensor]:
    """``(S,)`` whether clouds ``(S, N, 3)`` are classified correctly, for each kind of defender."""
    if defence == NO_DEFENCE:
        right = bench.predictions(victim, points) == bench.labels
        return dict.fromkeys(("known", "fresh", "mean"), right)
    purifier = purifier_of(defence, bench.device)

    def logits(seed: int) -> Tensor:
        defended = Defended(victim.model, purifier, seed=seed)
        return torch.cat([defended(part) for part in points.split(bench.batch)])

    draws = 1 if purifier.deterministic else DRAWS
    fresh = torch.stack([logits(FRESH + draw) for draw in range(draws)])
    return {
        "known": logits(bench.seed).argmax(1) == bench.labels,
        "fresh": fresh[0].argmax(1) == bench.labels,
        "mean": fresh.mean(0).argmax(1) == bench.labels,
    }


def row(bench: Bench, victim: Victim, defence: str, names: tuple[str, ...], steps: int) -> dict[str, Any]:
    """Accuracy of a victim behind a defence in %, by attacker and by defender, and under the worst of all."""
    attack = attacks.APGD(norm="linf", delta=DELTA, iterations=steps, early_stop=False)
    found = {"clean": correct(bench, victim, bench.points, defence)}
    for name in names:
        attacker = ATTACKERS[name]
        if attacker.gradient == "exact" and (
            defence == NO_DEFENCE or not purifier_of(defence, bench.device).differentiable
        ):
            continue
        if attacker.samples > 1 and (
            defence == NO_DEFENCE or purifier_of(defence, bench.device).deterministic
        ):
            continue  # all draws are equal
        points = attacked(bench, victim, attack, attacker, defence, bench.cache / "adaptive")
        found[name] = correct(bench, victim, points, defence)
        click.echo(f"{victim.title}, {defence}, {name}: {_shown(found[name])}")
    worst = {kind: torch.stack([one[kind] for one in found.values()]).all(0) for kind in found["clean"]}
    rates = {name: {kind: rate(right) for kind, right in one.items()} for name, one in found.items()}
    return {
        "victim": victim.title,
        "defence": defence,
        **bench.about(),
        "steps": steps,
        "delta": DELTA,
        "date": record.today(),
        "weights": victim.weights,
        "figures": {**rates, "worst": {kind: rate(right) for kind, right in worst.items()}},
    }


def _shown(right: dict[str, Tensor]) -> str:
    return ", ".join(f"{kind} {100 * float(value.float().mean()):.1f}" for kind, value in right.items())


@click.command()
@protocol_options("adaptive.json", clouds="100")
@several("attacker", DEFAULT, type=click.Choice(list(ATTACKERS)), help="Repeatable.")
@click.option("--steps", type=click.IntRange(min=1), default=20, show_default=True, help="Steps of APGD.")
def adaptive(
    protocol: Protocol,
    victims: tuple[str, ...],
    defences: tuple[str, ...],
    attackers: tuple[str, ...],
    steps: int,
    out: Path,
) -> None:
    """Attackers who know the defence, untargeted APGD in L∞ 0.05 (needs IFDEFENSE_DATA).

    Resumes after an interruption. A row replaces an older one of the same victim, defence and split.
    """
    bench = protocol.bench(100)
    for victim in (Victim.load(name, protocol.device) for name in victims):
        for defence in defences:
            made = row(bench, victim, defence, attackers, steps)
            old = json.loads(out.read_text(encoding="utf-8"))["rows"] if out.is_file() else []
            same = ("victim", "defence", "split")
            others = [one for one in old if any(one[key] != made[key] for key in same)]
            record.write(out, "adaptive", rows=[*others, made])
    result = json.loads(out.read_text(encoding="utf-8"))
    click.echo(text_table(*rows_of(result)))


def rows_of(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table: the accuracy of a fresh draw / of the mean of several."""
    shown = [
        "clean",
        *(name for name in ATTACKERS if any(name in r["figures"] for r in result["rows"])),
        "worst",
    ]
    lines = []
    for one in sorted(result["rows"], key=lambda r: (r["victim"], DEFENCES.index(r["defence"]))):
        cells = [one["figures"].get(name) for name in shown]
        texts = [
            "–" if cell is None else f"{cell['fresh']['accuracy']:.0f} / {cell['mean']['accuracy']:.0f}"
            for cell in cells
        ]
        lines.append([one["victim"], one["defence"], str(one["clouds"]), *texts])
    titles = [ATTACKERS[name].title if name in ATTACKERS else name for name in shown]
    return ["victim", "defence", "clouds", *titles], lines


def table(result: dict[str, Any]) -> str:
    """The table of the documents."""
    steps = "/".join(map(str, sorted({one["steps"] for one in result["rows"]})))
    return (
        f"{markdown(*rows_of(result))}\n\n"
        f"Accuracy in %: of one draw that the attacker does not know / of the mean logits of {DRAWS} "
        f"draws. APGD-CE in L∞ {DELTA}, {steps} steps, no target, made on the defended classifier unless "
        "*plain*; *exact* gradients are those of a differentiable method, others straight-through. *worst*: "
        "clouds that are classified correctly under every attacker, and clean."
    )
