"""What the flags are raised by: a defence in front of a classifier, examined on a few clouds.

`probe` examines its gradients, its randomness, an optimisation inside it, attacks of growing strength and the
frame of its results. The checks follow Athalye et al., 2018, section 3.1, `arXiv:1802.00420
<https://arxiv.org/abs/1802.00420>`_, Carlini et al., 2019, `arXiv:1902.06705
<https://arxiv.org/abs/1902.06705>`_, and those of AutoAttack. The code of this module and of its imports is
part of the keys of its results.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Variable

from attacks.defence_aware.model import EOT, DefenceAware, FunctionPurifier, PurifierLike
from attacks.gradient.pgd import PGD, descend
from attacks.oracle import Model, Oracle
from benchmarks.statistics import packed, paired
from ifdefense.geometry.frame import to_unit_sphere
from ifdefense.guard import normal
from ifdefense.logits import frozen
from ifdefense.purifiers.base import Purifier
from ifdefense.purifiers.defended import Defended

RANDOM = 1e-4  # difference of logits between draws, of the largest: above rounding
NUDGE = 1e-5  # shift of a coordinate, too small to matter but not for rounding

ATTACKED = 8
"""Clouds that are attacked; gradients are examined on all."""

REACH, STRIDE = 2.0, 0.1  # the cloud may cross the unit sphere, in steps that SOR does not undo
WALK = (1, 3, 6)  # of these steps, after which clouds are counted
FURTHER = (12, 40)  # steps on clouds that are left

Evidence = dict[str, Any]


class Victim(Protocol):
    """A classifier with a name."""

    @property
    def title(self) -> str:
        """Name in tables."""

    @property
    def model(self) -> Any:
        """``(B, N, 3)`` clouds to logits."""


class Labelled(Protocol):
    """Clean clouds with labels."""

    @property
    def points(self) -> Tensor:
        """``(S, N, 3)`` in the classifier's frame."""

    @property
    def labels(self) -> Tensor:
        """``(S,)`` classes."""


def probe(victim: Victim, defence: PurifierLike | None, clouds: Labelled, seed: int = 0) -> Evidence:
    """Examines a defence on a few clouds, with at least 20 passes of each.

    Args:
        victim: the classifier.
        defence: with the attributes of `attacks.defence_aware.model.PurifierLike`; ``None`` examines the
            classifier alone, which may contain its own defence.
        clouds: clean clouds; the first `ATTACKED` are attacked.
        seed: seed of the defence; also used: ``seed + 1`` and those of `attacks.EOT`.

    Returns:
        JSON-serialisable evidence for `flags`.
    """
    with frozen(victim.model):
        return _Probe(victim, defence, normal(clouds.points), normal(clouds.labels), seed).evidence()


@dataclasses.dataclass(frozen=True, eq=False)
class _Probe:
    victim: Victim
    defence: PurifierLike | None
    points: Tensor
    labels: Tensor
    seed: int

    def evidence(self) -> Evidence:
        purifier = _NOTHING if self.defence is None else self.defence
        plain = Defended(self.victim.model, purifier, seed=self.seed)
        with torch.no_grad(), engine_calls() as calls:
            purified = plain.purified(self.points, self.seed)
            logits = plain.classified(purified).to(self.points)
        with torch.no_grad():
            other = Defended(self.victim.model, purifier, seed=self.seed + 1)(self.points).to(self.points)
            noise = torch.rand(self.points.shape, generator=torch.Generator().manual_seed(self.seed))
            nudge = NUDGE * (2 * noise.to(self.points) - 1)
            nudged = plain(self.points + nudge).to(self.points)
        through = self._through(purifier)
        exact = self._exact(plain)
        gradients = {} if through is None else {"straight-through": _bad(through)}
        if exact is not None:
            gradients["exact"] = _bad(exact)
        right = (logits.argmax(1) == self.labels)[:ATTACKED]
        models = self._models(purifier, plain, exact)
        ladder = self._ladder(models[0] if models else None, right)
        unbounded = self._unbounded(models, ladder[STRIDE * WALK[-1], WALK[-1]])
        return {
            "victim": self.victim.title,
            "defence": "none" if self.defence is None else str(getattr(self.defence, "name", "defence")),
            "clouds": len(right),
            "clean": packed(right)[0],
            "difference": float((logits - other).abs().max() / logits.abs().max().clamp_min(1e-12)),
            "seedless": not getattr(self.defence or self.victim.model, "takes_seed", True),
            "optimises": {
                "declared": bool(getattr(self.defence, "optimises", False)),
                "calls": calls.count,
            },
            "gradients": gradients,
            "saturated": _share(_saturated(logits)),
            "flat": _share((logits == nudged).all(1)),
            "ladder": [
                {"epsilon": round(epsilon, 3), "steps": steps, "right": packed(left)[0]}
                for (epsilon, steps), left in ladder.items()
            ],
            "unbounded": {"accuracy": 100 * _share(unbounded), "right": packed(unbounded)[0]},
            "frame": self._frame(purified, purifier.normalise),
        }

    def _through(self, purifier: PurifierLike) -> Tensor | None:
        """Gradient past the defence, by the nearest input points."""
        if self.defence is None:
            return None
        eot = EOT(1, first=self.seed, fresh=False)
        return self._gradient(DefenceAware(self.victim.model, purifier, gradient="nearest", eot=eot))

    def _exact(self, plain: Defended) -> Tensor | None:
        """Gradient through the defence, ``None`` if it neither promises nor passes one."""
        declared = self.defence is None or self.defence.differentiable
        if declared:
            return self._gradient(plain)
        if isinstance(self.defence, Purifier):  # passes none, and warns of it
            return None
        with contextlib.suppress(RuntimeError, TypeError, ValueError):
            return self._gradient(plain, missing=None)
        return None

    def _gradient(self, model: Model, missing: float | None = 0.0) -> Tensor | None:
        """``(S, N, 3)`` gradient of the cross-entropy; ``missing`` everywhere if the logits have none."""
        with torch.enable_grad():
            points = self.points.detach().clone().requires_grad_()
            logits = model(points)
            if logits.requires_grad:
                loss = F.cross_entropy(logits, self.labels.to(logits.device), reduction="sum")
                (gradient,) = torch.autograd.grad(loss, points, allow_unused=True)
                if gradient is not None:
                    return gradient.detach()
        return None if missing is None else torch.full_like(self.points, missing)

    def _models(self, purifier: PurifierLike, plain: Defended, exact: Tensor | None) -> list[Model]:
        """Models that pass gradients: past the defence, and through it."""
        if self.defence is None:
            return [plain] if exact is not None and exact.any() else []
        eot = EOT(1, first=self.seed + 1)  # a new draw in every step
        through = DefenceAware(self.victim.model, purifier, gradient="nearest", eot=eot, seed=self.seed)
        return [through, plain] if exact is not None and exact.any() else [through]

    def _ladder(self, model: Model | None, right: Tensor) -> dict[tuple[float, int], Tensor]:
        """Clouds that are left by budget in L-inf and steps: after parts of a walk, and after small steps.

        Small steps are made if they may leave more clouds than the first step, or fewer than the last one.
        """
        walk = self._left(model, right, STRIDE, WALK)
        rungs = {(STRIDE * steps, steps): left for steps, left in zip(WALK, walk, strict=True)}
        if max(paired(right, walk[0])["low"], paired(walk[-1], torch.zeros_like(right))["low"]) > 0:
            (rungs[STRIDE, WALK[-1]],) = self._left(model, right, STRIDE / WALK[-1], WALK[-1:])
        return rungs

    def _unbounded(self, models: list[Model], left: Tensor) -> Tensor:
        """Clouds that are left if every point may go anywhere, of those that are left by the walk."""
        tries = itertools.product((WALK[-1], *FURTHER), models)
        for steps, model in itertools.islice(tries, 1, None):  # the first is the walk
            (left,) = self._left(model, left, STRIDE, (steps,))
        return left

    def _left(self, model: Model | None, right: Tensor, stride: float, counts: Sequence[int]) -> list[Tensor]:
        """``(S,)`` clouds of ``right`` still classified correctly after numbers of steps of PGD in L-inf.

        From the clean cloud itself, as a random start alone would break a defence without gradients.
        """
        found = [right.clone() for _ in counts]
        rows = right.nonzero().squeeze(1)
        if model is None or len(rows) == 0:
            return found
        attack, clean = PGD("linf", epsilon=REACH), self.points[rows]
        # Gradients that are not finite stop the attack, which is then without success.
        with contextlib.suppress(ValueError), torch.no_grad(), frozen(model):
            oracle, moved = Oracle(model, self.labels[rows], None), clean.clone()
            for left, (before, count) in zip(found, itertools.pairwise((0, *counts)), strict=True):
                moved, _ = descend(attack, oracle, clean, moved, count - before, stride / REACH)
                left[rows] = ~oracle.reached(oracle.logits(moved))
        return found

    def _frame(self, purified: Tensor, normalise: bool) -> dict[str, float]:
        """Largest shift of the centre and change of the scale, in radii of the clean cloud; medians."""
        given = to_unit_sphere(purified) if normalise else purified
        centre, radius = _frame_of(given.to(self.points))
        clean_centre, clean_radius = _frame_of(self.points)
        return {
            "centre": float(((centre - clean_centre).norm(dim=1) / clean_radius).median()),
            "scale": float((radius / clean_radius).median()),
        }


def _share(mask: Tensor) -> float:
    return float(mask.double().mean())


def _bad(gradient: Tensor) -> dict[str, float]:
    """Shares of clouds without a gradient, and with one that is not finite."""
    flat = gradient.flatten(1)
    return {"zero": _share((flat == 0).all(1)), "not finite": _share(~flat.isfinite().all(1))}


def _saturated(logits: Tensor) -> Tensor:
    """``(S,)`` whether the probability of all other classes is below the precision of float32.

    All true if the model returns probabilities, whose softmax has next to no gradient either.
    """
    values = logits.double()
    if (values >= 0).all() and ((values.sum(1) - 1).abs() < 1e-4).all():
        return torch.ones_like(values[:, 0], dtype=torch.bool)
    others = values.softmax(1).topk(2, dim=1).values[:, 1]
    return others < torch.finfo(torch.float32).eps / 2


def _frame_of(points: Tensor) -> tuple[Tensor, Tensor]:
    """``(S, 3)`` centres and ``(S,)`` largest distances from them."""
    centre = points.mean(1)
    return centre, (points - centre[:, None]).norm(dim=2).amax(1)


def _unchanged(points: Tensor, num_points: int | None, seed: int) -> Tensor:
    return points


_NOTHING = FunctionPurifier(_unchanged, deterministic=True, differentiable=True)


class _Counting:
    """The engine of autograd, counting its calls."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.count = 0

    def run_backward(self, *args: Any, **options: Any) -> Any:
        self.count += 1
        return self._engine.run_backward(*args, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


@contextlib.contextmanager
def engine_calls() -> Iterator[_Counting]:
    """Counts how often autograd runs backwards, by whatever function and in whatever thread."""
    engine = Variable._execution_engine
    counting = _Counting(engine)
    Variable._execution_engine = counting  # type: ignore[assignment]
    try:
        yield counting
    finally:
        Variable._execution_engine = engine
