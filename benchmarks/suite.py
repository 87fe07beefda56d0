"""The attacks that benchmarks run, by name, at the published settings or at what an hour of a CPU affords."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

import attacks
from attacks.optimised.carlini_wagner import CarliniWagner
from classifiers.pointnet import PointNet


def _named(settings: str) -> str:
    """Settings without the addresses of functions."""
    return re.sub(r"<function (\S+) at 0x[0-9a-f]+>", r"\1", settings)


def changed(settings: str) -> str:
    """What `Entry.settings` says, less the values that are the defaults of the attack's class."""
    title, _, values = settings.removesuffix(")").partition("(")
    fields = dataclasses.fields(getattr(attacks, title))
    defaults = {field.name: _named(repr(field.default)) for field in fields}
    parts = re.findall(r"(\w+)=('[^']*'|[^,]+)", _named(values))
    return f"{title}({', '.join(f'{name}={value}' for name, value in parts if defaults.get(name) != value)})"


@dataclass(frozen=True)
class Entry:
    """An attack of the suite.

    Attributes:
        title: heading of its column or row.
        group: heading that it stands under.
        targeted: whether it aims at the fixed random targets.
        published: makes it with its published settings, which are the defaults of its class.
        affordable: makes it with fewer passes, for machines without a GPU; ``None`` where the published
            settings are affordable.
        passes: gradients or queries a cloud, as affordable.
        adaptive: whether it is also made through the defence.
        clouds: how many test clouds are affordable with a classifier as fast as PointNet.
    """

    title: str
    group: str
    targeted: bool
    published: Callable[[], attacks.Attack]
    affordable: Callable[[], attacks.Attack] | None = None
    passes: int = 1
    adaptive: bool = False
    clouds: int = 200

    def attack(self, published: bool = False, slow: bool = False) -> attacks.Attack:
        """The attack, with the published settings or with affordable ones.

        Where a victim is `slow`, affordable searches for a nearer cloud are left out.
        """
        if published or self.affordable is None:
            return self.published()
        attack = self.affordable()
        return (
            dataclasses.replace(attack, searches=1) if slow and isinstance(attack, CarliniWagner) else attack
        )

    def settings(self, published: bool = False, slow: bool = False) -> str:
        """The attack and its settings as text, functions by their names."""
        return _named(str(self.attack(published, slow)))

    def affordable_clouds(self, victim: nn.Module, adaptive: bool = False) -> int:
        """How many clouds take minutes rather than hours of a CPU.

        A tenth of `clouds`, at least 20, for a `slow` victim and through a defence that rebuilds the surface.
        """
        few = self.passes > 1 and (adaptive or slow(victim))
        return max(20, self.clouds // 10) if few else self.clouds


def slow(victim: nn.Module) -> bool:
    """Whether a gradient costs ten times as much as one of PointNet, as with networks of neighbourhoods."""
    return not isinstance(victim, PointNet)


def _gradient(
    title: str, targeted: bool, make: Callable[[], attacks.Attack], passes: int, clouds: int
) -> Entry:
    return Entry(title, "gradient", targeted, make, None, passes, True, clouds)


# Tuned on validation clouds of the shipped PointNet. A long search with next to no weight on the distance
# finds what several short ones from the published weight leave unreached, and a second one comes nearer; with
# `polish` the easy examples do not wait for the hard ones, and `passes` is about the mean.
SUITE: dict[str, Entry] = {
    "fgm": _gradient("FGM", True, attacks.FGM, 1, 400),
    "ifgm": _gradient("I-FGM", True, attacks.IFGM, 50, 100),
    "mifgm": _gradient("MI-FGM", True, attacks.MIFGM, 50, 100),
    "pgd": _gradient("PGD", True, attacks.PGD, 50, 200),
    "pgd-untargeted": _gradient("PGD untargeted", False, attacks.PGD, 50, 200),
    "pgd-point": _gradient("PGD, per point, untargeted", False, lambda: attacks.PGD("point-l2"), 50, 200),
    "pgd-linf": _gradient(
        "PGD, L∞ 0.05, untargeted", False, lambda: attacks.PGD("linf", delta=0.05), 50, 200
    ),
    "apgd-ce": _gradient("APGD-CE untargeted", False, attacks.APGD, 100, 200),
    "apgd-dlr": _gradient("APGD-DLR untargeted", False, lambda: attacks.APGD(loss="dlr"), 100, 200),
    "perturb": Entry(
        "Perturb",
        "optimised",
        True,
        attacks.Perturb,
        lambda: attacks.Perturb(
            first_weight=0.01, largest_weight=2, searches=2, iterations=600, rate=3e-2, polish=50
        ),
        200,
    ),
    "knn": Entry(
        "kNN",
        "optimised",
        True,
        attacks.KNN,
        # A fifth of the published weights, with which few targets are reached.
        lambda: attacks.KNN(chamfer_weight=1, knn_weight=0.6, iterations=300, rate=1e-2, project=False),
        300,
        clouds=50,
    ),
    "geoa3": Entry(
        "GeoA3",
        "optimised",
        True,
        attacks.GeoA3,
        lambda: attacks.GeoA3(first_weight=1, searches=1, iterations=500, polish=50),
        100,
        clouds=50,
    ),
    "si-adv": Entry(
        "SI-Adv", "optimised", False, attacks.SIAdv, lambda: attacks.SIAdv(iterations=150), 150, adaptive=True
    ),
    "aof": Entry(
        "AOF",
        "optimised",
        False,
        attacks.AOF,
        lambda: attacks.AOF(restarts=1, iterations=100),
        100,
        clouds=50,
    ),
    "advpc": Entry(
        "AdvPC",
        "optimised",
        False,
        attacks.AdvPC,
        lambda: attacks.AdvPC(restarts=1, iterations=100),
        200,
        clouds=50,
    ),
    "hit-adv": Entry(
        "HiT-ADV", "optimised", False, attacks.HiTADV, lambda: attacks.HiTADV(searches=2), 200, clouds=50
    ),
    "add-cd": Entry(
        "Add-CD",
        "adding",
        True,
        attacks.AddCD,
        lambda: attacks.AddCD(
            first_weight=0.5, largest_weight=1000, searches=2, iterations=600, rate=3e-2, polish=30
        ),
        100,
        clouds=100,
    ),
    "add-hd": Entry(
        "Add-HD",
        "adding",
        True,
        attacks.AddHD,
        lambda: attacks.AddHD(
            first_weight=0.02, largest_weight=40, searches=2, iterations=600, rate=3e-2, polish=30
        ),
        100,
        clouds=100,
    ),
    "add-cluster": Entry(
        "Add-Cluster",
        "adding",
        True,
        attacks.AddCluster,
        lambda: attacks.AddCluster(first_weight=1, searches=1, iterations=600, rate=3e-2, polish=50),
        100,
        clouds=100,
    ),
    "add-object": Entry(
        "Add-Object",
        "adding",
        True,
        attacks.AddObject,
        lambda: attacks.AddObject(first_weight=1, searches=1, iterations=600, rate=3e-2, polish=50),
        100,
        clouds=100,
    ),
    "drop-100": Entry("Drop-100", "dropping", False, lambda: attacks.SaliencyDrop(100), None, 20, clouds=400),
    "drop-200": Entry("Drop-200", "dropping", False, attacks.SaliencyDrop, None, 40, clouds=400),
    "random-drop": Entry(
        "Random drop of 512", "dropping", False, lambda: attacks.RandomDrop(512), clouds=400
    ),
    "local-drop": Entry("Local drop of 200", "dropping", False, attacks.LocalDrop, clouds=400),
    "square": Entry(
        "Square, L∞ 0.08",
        "black box",
        False,
        attacks.Square,
        lambda: attacks.Square(queries=300),
        300,
        clouds=100,
    ),
    "jgba": Entry("JGBA", "defence-aware", False, attacks.JGBA, None, 80),
}
"""Attacks by name."""


def names(group: str | None = None) -> tuple[str, ...]:
    """Names of the suite, or of one of its groups, in its order."""
    return tuple(name for name, entry in SUITE.items() if group in (None, entry.group))
