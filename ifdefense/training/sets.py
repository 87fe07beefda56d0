"""The data sets that networks are trained on, by name."""

from __future__ import annotations

from ifdefense.data.cloudset import CloudSet
from ifdefense.data.modelnet import load_modelnet40
from ifdefense.shapes.procedural import make_dataset

NAMES = ("modelnet40", "procedural")


def training_sets(name: str) -> tuple[CloudSet, CloudSet]:
    """Training and validation clouds; none of a test set.

    Args:
        name: ``"modelnet40"`` (root from ``IFDEFENSE_DATA``), of whose training set both are parts, as
            `ifdefense.data.modelnet.holdout` cuts it; or ``"procedural"``, 300 and 30 clouds a class.

    Raises:
        ValueError: if there is no such set.
    """
    if name == "modelnet40":
        return load_modelnet40(split="train"), load_modelnet40(split="validation")
    if name == "procedural":
        return make_dataset(300, 1024, seed=1), make_dataset(30, 1024, seed=2)
    raise ValueError(f"there is no training set {name!r}; there are {', '.join(NAMES)}")
