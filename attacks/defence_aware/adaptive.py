"""Adaptive attacks: through the defence, with the plain attack as a fallback."""

from __future__ import annotations

from attacks.base import Attack
from attacks.black_box.transfer import Transfer
from attacks.defence_aware.model import EOT, DefenceAware, Gradient, PurifierLike
from attacks.oracle import Model
from attacks.worst_of import WorstOf


def adaptive(
    attack: Attack,
    classifier: Model,
    purifier: PurifierLike,
    *,
    gradient: Gradient | None = None,
    eot: EOT | None = None,
    num_points: int | None = None,
    normalise: bool | None = None,
    seed: int = 0,
    up: str | None = None,
) -> tuple[WorstOf, DefenceAware]:
    """Wraps the attack with BPDA and EOT; if it fails for a cloud, the plain attack is used.

    Returns the attack and the model to call it on::

        attack, model = attacks.adaptive(attacks.PGD(), classifier, purifier)
        result = attack(model, clouds, labels)

    This is ``WorstOf((attack, Transfer(attack, classifier)))`` on ``DefenceAware(classifier, purifier)``: per
    cloud, it is at least as strong as the attack on the bare classifier. For the attack through the defence
    alone, use a `DefenceAware` as model. Arguments are those of `DefenceAware`.

    Examples:
        >>> plain, purifier = attacks.PGD("linf", iterations=2), ifdefense.load("sor")
        >>> attack, model = attacks.adaptive(plain, classifier, purifier)
        >>> result = attack(model, points, labels)
        >>> result.points.shape
        torch.Size([2, 64, 3])
    """
    model = DefenceAware(
        classifier,
        purifier,
        gradient=gradient,
        eot=eot,
        num_points=num_points,
        normalise=normalise,
        seed=seed,
        up=up,
    )
    return WorstOf((attack, Transfer(attack, classifier))), model
