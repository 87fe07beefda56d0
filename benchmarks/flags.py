"""Signs that a figure says more about the attacks than about the defence.

`probe` examines a defence in front of a classifier on a few clouds: its gradients, its randomness, an
optimisation inside it, attacks of growing strength and the frame of its results. `flags` combines this with
the cells of the grid. The checks follow Athalye et al., 2018, section 3.1, `arXiv:1802.00420
<https://arxiv.org/abs/1802.00420>`_, Carlini et al., 2019, `arXiv:1902.06705
<https://arxiv.org/abs/1902.06705>`_, and those of AutoAttack.

A flag is no verdict: it says what may be wrong with a number, and how that was seen.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Variable

from attacks import EOT, PGD, Attack, DefenceAware, FunctionPurifier, Transfer, WorstOf
from attacks.defence_aware.model import PurifierLike
from attacks.oracle import Model, frozen
from benchmarks import statistics
from benchmarks.cells import TRANSFER
from benchmarks.suite import SUITE
from ifdefense import Defended, Purifier
from ifdefense.geometry.frame import to_unit_sphere
from ifdefense.guard import normal

FLAGS = {
    "masked-gradients": "gradients are zero, not finite or saturated, so attacks by gradients cannot work",
    "random-without-eot": "the defence is random and no attack averaged its gradients over draws",
    "random-without-seed": "the defence is random and takes no seed, so nobody else gets the same figure",
    "black-box-beats-white-box": "an attack without gradients is stronger than those with gradients",
    "more-is-weaker": "more steps or a larger budget raise the accuracy",
    "unbounded-attack-fails": "the cloud may go anywhere, and the attack by gradients still fails",
    "optimises": "the defence optimises by gradients at inference, which attacks do not differentiate",
    "adaptive-above-static": "attacks through the defence are weaker than those that ignore it",
    "weak-attack": "the attack rarely succeeds without a defence, so it is left out of the mean",
    "leaves-frame": "purified clouds leave the centre and scale that the classifier was trained on",
}
"""Meaning of each flag by name."""

MASKED = 0.2  # share of clouds
UNBOUNDED = 5.0  # accuracy in %
WEAK = 80.0  # success in % without a defence, below which an attack is left out of the mean
RANDOM = 1e-4  # difference of logits, of the largest: above rounding
CENTRE, SCALE = 0.1, 0.15  # of the radius of the clean cloud
NUDGE = 1e-5  # shift of a coordinate, too small to matter but not for rounding

ATTACKED = 8
"""Clouds that are attacked; gradients are examined on all."""

REACH, STRIDE = 2.0, 0.1  # the cloud may cross the unit sphere, in steps that SOR does not undo
LADDER = ((0.1, 2), (0.1, 6), (0.3, 6))  # budget in L-inf and steps, each at least as strong as the last

Cell = dict[str, Any]
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
    """Examines a defence on a few clouds, with about 40 passes of each.

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
            logits = plain(self.points).float()
        with torch.no_grad():
            other = Defended(self.victim.model, purifier, seed=self.seed + 1)(self.points).float()
            noise = torch.rand(self.points.shape, generator=torch.Generator().manual_seed(self.seed))
            nudge = NUDGE * (2 * noise.to(self.points) - 1)
            nudged = plain(self.points + nudge).float()
            purified = purifier(self.points, None, self.seed)
        through = self._through(purifier)
        exact = self._exact(plain)
        gradients = {} if through is None else {"straight-through": _bad(through)}
        if exact is not None:
            gradients["exact"] = _bad(exact)
        right = (logits.argmax(1) == self.labels.to(logits.device))[:ATTACKED]
        models = self._models(purifier, plain, exact)
        return {
            "victim": self.victim.title,
            "defence": "none" if self.defence is None else str(getattr(self.defence, "name", "defence")),
            "clouds": len(right),
            "clean": statistics.packed(right)[0],
            "difference": float((logits - other).abs().max() / logits.abs().max().clamp_min(1e-12)),
            "seedless": not getattr(self.defence or self.victim.model, "takes_seed", True),
            "optimises": {
                "declared": bool(getattr(self.defence, "optimises", False)),
                "calls": calls.count,
            },
            "gradients": gradients,
            "saturated": _share(_saturated(logits)),
            "flat": _share((logits == nudged).all(1)),
            "ladder": self._ladder(models, right),
            "unbounded": self._unbounded(models, right),
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

    def _attacked(self, attacks: list[Attack], models: list[Model], right: Tensor) -> Tensor:
        """``(S,)`` clouds still classified correctly after the worst of the attacks on each of the models."""
        rows = right.nonzero().squeeze(1)
        if not models or len(rows) == 0:
            return right
        tried = tuple(
            attack if model is models[0] else Transfer(attack, model)
            for attack in attacks
            for model in models
        )
        standing = right.clone()
        # Gradients that are not finite stop the attack, which is then without success.
        with contextlib.suppress(ValueError):
            result = WorstOf(tried)(models[0], self.points[rows], self.labels[rows])
            standing[rows] = ~result.success
        return standing

    def _ladder(self, models: list[Model], right: Tensor) -> list[dict[str, Any]]:
        """Correctly classified clouds under attacks of growing strength."""
        rungs = []
        for epsilon, steps in LADDER:
            attack = PGD("linf", epsilon=epsilon, iterations=steps, random_start=False)
            standing = self._attacked([attack], models[:1], right)
            rungs.append({"epsilon": epsilon, "steps": steps, "right": statistics.packed(standing)[0]})
        return rungs

    def _unbounded(self, models: list[Model], right: Tensor) -> dict[str, Any]:
        """Correctly classified clouds if every point may go anywhere.

        From the clean cloud itself, as a random start alone would break a defence without gradients.
        """
        walk = PGD("linf", epsilon=REACH, iterations=6, step=STRIDE / REACH, random_start=False)
        # A random defence may disagree just beyond the boundary.
        walk = dataclasses.replace(walk, early_stop=self.defence is None or self.defence.deterministic)
        further = dataclasses.replace(walk, iterations=40)
        standing = self._attacked([walk, further], models, right)
        return {"accuracy": 100 * _share(standing), "right": statistics.packed(standing)[0]}

    def _frame(self, purified: Tensor, normalise: bool) -> dict[str, float]:
        """Largest shift of the centre and change of the scale, in radii of the clean cloud; medians."""
        given = to_unit_sphere(purified) if normalise else purified
        centre, radius = _frame_of(given.to(self.points))
        clean_centre, clean_radius = _frame_of(self.points)
        return {
            "centre": float(((centre - clean_centre).norm(dim=1) / clean_radius).median()),
            "scale": float((radius / clean_radius).median()),
        }


def flags(evidence: Evidence, cells: list[Cell]) -> list[dict[str, Any]]:
    """Flags of a defence in front of a classifier.

    Args:
        evidence: of `probe`.
        cells: cells of the grid; those of other victims and defences are ignored, except undefended ones.

    Returns:
        JSON-serialisable flags in the order of `FLAGS`: ``name``, ``victim``, ``defence``, ``sources`` (the
        attacks concerned, empty for the defence itself), ``share`` (0 to 1) and ``says``, one sentence.
    """
    victim, defence = evidence["victim"], evidence["defence"]
    of_victim = [cell for cell in cells if cell["victim"] == victim]
    own = [cell for cell in of_victim if cell["defence"] == defence]
    bare = [cell for cell in of_victim if cell["defence"] == "none"]
    found = [
        check(evidence, own)
        for check in (_masked, _random, _unseeded, _black_box, _more, _failing, _inner, _above)
    ]
    found += [_weak(bare), _leaves(evidence)]
    return [
        {"name": name, "victim": victim, "defence": defence, **flag}
        for name, flag in zip(FLAGS, found, strict=True)
        if flag is not None
    ]


Flag = dict[str, Any] | None


def _flag(share: float, says: str, sources: list[str] | None = None) -> Flag:
    return {"sources": sources or [], "share": round(share, 4), "says": says}


def _masked(evidence: Evidence, cells: list[Cell]) -> Flag:
    shares = {
        f"the {name} gradient is {kind} on {{}} of the clouds": share
        for name, kinds in evidence["gradients"].items()
        for kind, share in kinds.items()
    }
    shares["the softmax is saturated on {} of the clouds"] = evidence["saturated"]
    shares["small shifts of the points change nothing on {} of the clouds"] = evidence["flat"]
    raised = {says: share for says, share in shares.items() if share >= MASKED}
    if not raised:
        return None
    says = "; ".join(text.format(f"{share:.0%}") for text, share in raised.items())
    return _flag(max(raised.values()), says[0].upper() + says[1:] + ".")


def _random(evidence: Evidence, cells: list[Cell]) -> Flag:
    if evidence["difference"] <= RANDOM or any("eot" in cell["knowledge"] for cell in cells):
        return None
    return _differing(evidence, "no attack averages its gradients over draws (EOT).")


def _unseeded(evidence: Evidence, cells: list[Cell]) -> Flag:
    if evidence["difference"] <= RANDOM or not evidence["seedless"]:
        return None
    return _differing(
        evidence,
        "the defence takes no seed: it was run with seeded global generators, so its draws cannot be "
        "repeated elsewhere.",
    )


def _differing(evidence: Evidence, says: str) -> Flag:
    share = evidence["difference"]
    return _flag(min(1.0, share), f"Logits of two calls differ by {share:.1%} of the largest, and {says}")


def _black_box(evidence: Evidence, cells: list[Cell]) -> Flag:
    attacked = [cell for cell in cells if cell["source"] in SUITE and "right" in cell]
    sources, gap = [], 0.0
    for black in attacked:
        if not _blind(black):
            continue
        white = [cell for cell in attacked if not _blind(cell) and _comparable(black, cell)]
        if white and (low := _ahead(_worst(white), black)) > 0:
            sources.append(black["source"])
            gap = max(gap, low)
    if not sources:
        return None
    return _flag(
        gap / 100,
        f"{_titles(attacked, sources)} leaves fewer clouds than attacks by gradients with the same budget.",
        sources,
    )


def _more(evidence: Evidence, cells: list[Cell]) -> Flag:
    rungs = [*evidence["ladder"], {"epsilon": REACH, "steps": 46, **evidence["unbounded"]}]
    sources, says, gap = [], [], 0.0
    for weaker, stronger in itertools.pairwise(rungs):
        difference = _low(stronger["right"], weaker["right"])
        if difference > 0:
            gap = max(gap, difference)
            says.append(
                f"PGD with L∞ {stronger['epsilon']:g} and {stronger['steps']} steps leaves more clouds than "
                f"with {weaker['epsilon']:g} and {weaker['steps']}."
            )
    attacked = [cell for cell in cells if cell["source"] in SUITE and "right" in cell]
    for weaker in attacked:
        for stronger in attacked:
            if _stronger(stronger, weaker) and (low := _ahead([stronger], weaker)) > 0:
                sources.append(stronger["source"])
                gap = max(gap, low)
                says.append(f"{stronger['title']} leaves more clouds than {weaker['title']}.")
    return _flag(gap / 100, " ".join(says), sources) if says else None


def _failing(evidence: Evidence, cells: list[Cell]) -> Flag:
    left = evidence["unbounded"]["accuracy"]
    if left <= UNBOUNDED:
        return None
    return _flag(
        left / 100,
        f"With points that may go anywhere, {left:.0f}% of the clouds are still classified correctly.",
    )


def _inner(evidence: Evidence, cells: list[Cell]) -> Flag:
    declared, calls = evidence["optimises"]["declared"], evidence["optimises"]["calls"]
    if not declared and not calls:
        return None
    seen = f"autograd ran {calls} times during one call" if calls else "the defence declares it"
    return _flag(1.0, f"The defence optimises by gradients at inference: {seen}.")


def _above(evidence: Evidence, cells: list[Cell]) -> Flag:
    sources, gap = [], 0.0
    for static in cells:
        if static["knowledge"] != "static" or "right" not in static:
            continue
        adaptive = [
            cell
            for cell in cells
            if cell["source"] == static["source"] and cell["knowledge"] not in ("none", "static")
        ]
        if adaptive and (low := _ahead(adaptive, static)) > 0:
            sources.append(static["source"])
            gap = max(gap, low)
    if not sources:
        return None
    return _flag(
        gap / 100,
        f"{_titles(cells, sources)}: stronger without knowledge of the defence than with it.",
        sources,
    )


def _weak(bare: list[Cell]) -> Flag:
    weak = [cell for cell in bare if cell["knowledge"] == "static" and cell.get("success", 100.0) < WEAK]
    if not weak:
        return None
    listed = ", ".join(f"{cell['title']} ({cell['success']:.0f}%)" for cell in weak)
    return _flag(
        min(cell["success"] for cell in weak) / 100,
        f"Success without a defence is below {WEAK:.0f}%: {listed}; left out of the mean.",
        [cell["source"] for cell in weak],
    )


def _leaves(evidence: Evidence) -> Flag:
    centre, scale = evidence["frame"]["centre"], evidence["frame"]["scale"]
    if centre <= CENTRE and abs(scale - 1) <= SCALE:
        return None
    return _flag(
        max(centre, abs(scale - 1)),
        f"Purified clouds are shifted by {centre:.2f} radii and {scale:.2f} times as large as clean ones.",
    )


def _worst(cells: list[Cell]) -> Tensor:
    """``(S,)`` share of draws in which a cloud withstands every attack, on the clouds that all have."""
    parts = [statistics.unpacked(cell["right"]) for cell in cells]
    count = min(part.shape[1] for part in parts)
    return statistics.worst([part[:, :count] for part in parts])


def _ahead(cells: list[Cell] | Tensor, other: Cell) -> float:
    """Lower end of the interval, in %, by which more clouds withstand all ``cells`` than the other."""
    withstood = cells if isinstance(cells, Tensor) else _worst(cells)
    right = statistics.unpacked(other["right"])
    count = min(withstood.shape[1], right.shape[1])
    return statistics.paired(withstood[:, :count], right[:, :count])["low"]


def _low(right: str, other: str) -> float:
    """As `_ahead`, of strings of one draw."""
    return statistics.paired(statistics.unpacked([right]), statistics.unpacked([other]))["low"]


def _blind(cell: Cell) -> bool:
    """Whether the attack has no gradients of what it attacks."""
    knowledge = SUITE[cell["source"]].attack().threat.knowledge
    return knowledge == "score-based" or cell["knowledge"].startswith(TRANSFER)


def _kind(cell: Cell) -> tuple[Any, ...]:
    """What an attack may change, apart from the amount, and its goal."""
    budget = {name: value for name, value in (cell.get("budget") or {}).items() if name not in _AMOUNTS}
    return SUITE[cell["source"]].targeted, sorted(budget.items())


_AMOUNTS = ("epsilon", "count")


def _amount(cell: Cell) -> float | None:
    budget = cell.get("budget") or {}
    return next((budget[name] for name in _AMOUNTS if budget.get(name) is not None), None)


def _comparable(black: Cell, white: Cell) -> bool:
    """Whether the attack by gradients has the same goal and at least the budget of the other."""
    small, large = _amount(black), _amount(white)
    return _kind(black) == _kind(white) and small is not None and large is not None and large >= small


def _stronger(more: Cell, less: Cell) -> bool:
    """Whether one cell is the same attack as another with a larger budget or more steps."""
    same = ("knowledge", "defence")
    if any(more[name] != less[name] for name in same) or _kind(more) != _kind(less):
        return False
    if more["settings"].partition("(")[0] != less["settings"].partition("(")[0]:
        return False
    small, large = _amount(less), _amount(more)
    if small is None or large is None or large < small or more["passes"] < less["passes"]:
        return False
    return large > small or bool(more["passes"] > less["passes"])


def _titles(cells: list[Cell], sources: list[str]) -> str:
    titles = {cell["source"]: cell["title"] for cell in cells}
    return ", ".join(titles[source] for source in sources)


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
