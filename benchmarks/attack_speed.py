"""Time of attacks in bare forward and backward passes of the model.

The baseline is the same number of passes of the model on clouds of the same size, including the gradient of
the points. Attack and baseline are timed alternately, so that load on the machine affects both; the ratio is
the median over the pairs.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attacks
import classifiers
from attacks import Attack
from benchmarks import record
from benchmarks.clock import make_clouds, seconds, timing_options
from ifdefense.geometry.frame import to_unit_sphere

CLASSES = 40
TIMED: dict[str, tuple[Attack, int]] = {
    "PGD": (attacks.PGD(), 50),
    "PGD, L∞": (attacks.PGD("linf", delta=0.05), 50),
    "I-FGM": (attacks.IFGM(), 50),
    "APGD-CE": (attacks.APGD(early_stop=False), 100),
    "SI-Adv": (attacks.SIAdv(), 50),
    "Perturb": (attacks.Perturb(searches=2, iterations=25), 50),
    "Add-CD": (attacks.AddCD(searches=2, iterations=25), 50),
    "Add-HD": (attacks.AddHD(searches=2, iterations=25), 50),
    "Add-Cluster": (attacks.AddCluster(searches=2, iterations=25), 50),
    "kNN": (attacks.KNN(iterations=50), 50),
    "GeoA3": (attacks.GeoA3(searches=2, iterations=25), 50),
}
"""Attacks and their passes. The optimised ones use fewer steps than usual, because their cost is linear."""


def bare_passes(model: nn.Module, points: Tensor, labels: Tensor, count: int) -> None:
    """Forward and backward passes to the gradient of the points."""
    for _ in range(count):
        leaf = points.detach().requires_grad_()
        torch.autograd.grad(F.cross_entropy(model(leaf), labels, reduction="sum"), leaf)


def ratios(
    attack: Attack, passes: int, model: nn.Module, points: Tensor, labels: Tensor, repeats: int
) -> tuple[float, float]:
    """Seconds of the attack, and its time in bare passes on clouds of the attacked size; medians.

    Args:
        attack: the attack.
        passes: gradients that it takes.
        model: ``(B, N, 3)`` points to logits, without trainable parameters.
        points: ``(B, N, 3)`` clouds.
        labels: ``(B,)`` classes; the targets are the classes after them.
        repeats: pairs of runs, after one that warms up.
    """
    targets = (labels + 1) % CLASSES if attack.threat.goal != "untargeted" else None
    larger = points.repeat(1, 2, 1)[:, : points.shape[1] + attack.threat.count]
    taken, parts = [], []
    for _ in range(repeats + 1):
        taken.append(seconds(lambda: attack(model, points, labels, targets)))
        parts.append(taken[-1] / seconds(lambda: bare_passes(model, larger, labels, passes)))
    return statistics.median(taken[1:]), statistics.median(parts[1:])


@click.command()
@click.option(
    "--attack",
    "chosen",
    multiple=True,
    type=click.Choice(list(TIMED)),
    default=TIMED,
    help="Repeatable; all by default.",
)
@click.option("--clouds", type=click.IntRange(min=1), default=16, show_default=True)
@timing_options("attack_speed.json")
def attack_speed(chosen: tuple[str, ...], clouds: int, repeats: int, device: torch.device, out: Path) -> None:
    """Times attacks on the shipped PointNet against bare forward and backward passes.

    The JSON is written after every attack.
    """
    model = classifiers.fold(classifiers.load("pointnet-modelnet40")).to(device)
    points = to_unit_sphere(torch.from_numpy(make_clouds(clouds)).to(device))
    labels = torch.arange(clouds, device=device) % CLASSES
    figures: dict[str, dict[str, float]] = {}
    for name in chosen:
        attack, passes = TIMED[name]
        taken, ratio = ratios(attack, passes, model, points, labels, repeats)
        figures[name] = {"passes": passes, "seconds": round(taken, 3), "ratio": round(ratio, 3)}
        click.echo(f"{name}: {passes} passes in {taken:.2f} s, {ratio:.2f} times the bare passes")
        about = {"clouds": clouds, "points": points.shape[1], "repeats": repeats, "device": str(device)}
        record.write(out, "attack-speed", **about, attacks=figures)
