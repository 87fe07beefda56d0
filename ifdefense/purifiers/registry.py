"""Registry of methods, used by `ifdefense.load`, the command line, the benchmarks and the docs."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ifdefense.purifiers.base import Purifier


@dataclasses.dataclass(frozen=True)
class Method:
    """A method of purification.

    Attributes:
        summary: one-line description.
        factory: ``"module:function"`` that builds the purifier with the shipped weights.
        network: whether it uses an implicit network; the others are baselines.
        differentiable: whether gradients can propagate; they do if the points require them.
        weights: name of weights that are not always shipped; the method is unavailable without them.

    Examples:
        >>> METHODS["sor"].make()
        StatisticalOutlierRemoval()
    """

    summary: str
    factory: str
    network: bool = True
    differentiable: bool = False
    weights: str | None = None

    def make(self) -> Purifier:
        """Builds the purifier."""
        module, _, name = self.factory.partition(":")
        function: Callable[[], Purifier] = getattr(importlib.import_module(module), name)
        return function().eval()


_WEIGHTS = Path(__file__).parents[1] / "weights"

METHODS = {
    "local-mesh": Method(
        "SOR, then samples of the repaired mesh of a local occupancy network, moved to where its field is "
        "largest",
        "ifdefense.purifiers.pretrained:local_mesh",
        differentiable=True,
    ),
    "local-random": Method(
        "local-mesh of a random half of the points with noise, depending on the seed, without the repair",
        "ifdefense.purifiers.pretrained:local_random",
        differentiable=True,
    ),
    "onet-fill": Method(
        "SOR, mean of 8 neighbours, and samples of an Occupancy Network's surface where points are missing",
        "ifdefense.purifiers.pretrained:onet_fill",
    ),
    "onet-mesh": Method(
        "samples of the repaired mesh of an Occupancy Network",
        "ifdefense.purifiers.pretrained:onet_mesh",
    ),
    "onet-opt": Method(
        "points attracted to the surface of an Occupancy Network and spread over it, without a mesh",
        "ifdefense.purifiers.pretrained:onet_opt",
    ),
    "convonet-mesh": Method(
        "samples of the mesh of a Convolutional Occupancy Network",
        "ifdefense.purifiers.pretrained:convonet_mesh",
        weights="convonet",
    ),
    "convonet-opt": Method(
        "points attracted to the surface of a Convolutional Occupancy Network and spread over it",
        "ifdefense.purifiers.pretrained:convonet_opt",
        weights="convonet",
    ),
    "dup-net": Method(
        "SOR, then PU-Net, which upsamples by a factor of four; samples of its 4,096 points",
        "ifdefense.purifiers.pretrained:dup_net",
        network=False,
        differentiable=True,
        weights="punet",
    ),
    "sor-ae": Method(
        "SOR, then the reconstruction of an auto-encoder of 1,024 points",
        "ifdefense.purifiers.pretrained:sor_ae",
        network=False,
        differentiable=True,
    ),
    "sor-smooth": Method(
        "statistical outlier removal, then the mean of 8 neighbours",
        "ifdefense.purifiers.pretrained:sor_smooth",
        network=False,
        differentiable=True,
    ),
    "sor": Method(
        "statistical outlier removal",
        "ifdefense.purifiers.filters:StatisticalOutlierRemoval",
        network=False,
        differentiable=True,
    ),
    "srs": Method(
        "simple random sampling, 500 of 1,024 points dropped",
        "ifdefense.purifiers.filters:SimpleRandomSampling",
        network=False,
        differentiable=True,
    ),
}
LACKING = {
    name: method.weights
    for name, method in METHODS.items()
    if method.weights is not None and not (_WEIGHTS / f"{method.weights}.safetensors").is_file()
}
"""Weights needed by each unavailable method, by the method's name."""

METHODS = {name: method for name, method in METHODS.items() if name not in LACKING}
"""All methods by name; the first is the default."""

_REMOVED = {"local-newton": "local-mesh", "local-random-newton": "local-random"}
"""Removed methods of earlier versions, and their replacements."""

DEFAULT = next(iter(METHODS))
"""Method of `ifdefense.purify` unless told otherwise: the first of `METHODS`."""


def known(name_or_path: str | Path) -> str:
    """Checks that a name is that of a method or an existing file or folder.

    Raises:
        ValueError: if it is neither.

    Examples:
        >>> known("sor")
        'sor'
    """
    name = str(name_or_path)
    if name in METHODS or (name and Path(name).exists()):
        return name
    raise ValueError(unknown(name))


def unknown(name: str) -> str:
    """Error message for an unknown or unavailable method."""
    if name in LACKING:
        weights = LACKING[name]
        return (
            f"{name} needs weights that are not shipped; train them with "
            f"ifdefense train {weights} --out {_WEIGHTS / f'{weights}.safetensors'}"
        )
    if name in _REMOVED:
        return (
            f"{name} is no longer a method: use {_REMOVED[name]}, which passes gradients where the points "
            "require them"
        )
    return (
        f"unknown method {name!r}; there are {', '.join(METHODS)}, or give a file of weights or a saved "
        "folder that exists"
    )
