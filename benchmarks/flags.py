"""Signs that a figure says more about the attacks than about the defence.

`flags` combines the evidence of `benchmarks.probing` with the cells of the grid. A flag is no verdict: it
says what may be wrong with a number, and how that was seen.
"""

from __future__ import annotations

import itertools
from typing import Any

from torch import Tensor

from benchmarks import statistics
from benchmarks.cells import TRANSFER
from benchmarks.probing import RANDOM, Evidence
from benchmarks.suite import SUITE

AT_CHANCE = "victim-at-chance"

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
    AT_CHANCE: "the classifier itself is hardly better than chance on clean clouds",
}
"""Meaning of each flag by name."""

MASKED = 0.2  # share of clouds
UNBOUNDED = 5.0  # accuracy in %
WEAK = 80.0  # success in % without a defence, below which an attack is left out of the mean
CENTRE, SCALE = 0.1, 0.15  # of the radius of the clean cloud
SKILL = 0.2  # share of the way from chance to 100%; a wrong up axis leaves the shipped classifiers below it

Cell = dict[str, Any]


def flags(evidence: Evidence, cells: list[Cell]) -> list[dict[str, Any]]:
    """Flags of a defence in front of a classifier.

    Args:
        evidence: of `benchmarks.probing.probe`.
        cells: cells of the grid; those of other victims and defences are ignored, except undefended ones.

    Returns:
        JSON-serialisable flags in the order of `FLAGS`, without that of `at_chance`: ``name``, ``victim``,
        ``defence``, ``sources`` (the attacks concerned, empty for the defence itself), ``share`` (0 to 1) and
        ``says``, one sentence.
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
    names = [name for name in FLAGS if name != AT_CHANCE]
    return [
        {"name": name, "victim": victim, "defence": defence, **flag}
        for name, flag in zip(names, found, strict=True)
        if flag is not None
    ]


def at_chance(victim: str, classes: int, cells: list[Cell]) -> list[dict[str, Any]]:
    """The flag of a classifier that hardly recognises clean clouds, for each defence in front of it.

    It needs no evidence of a probe. The mean over classes counts, as a classifier that always gives the most
    frequent class is no better than chance.

    Args:
        victim: title of the classifier.
        classes: number of classes that it distinguishes.
        cells: cells of the grid.

    Returns:
        Flags as those of `flags`.
    """
    clean = [cell for cell in cells if cell["victim"] == victim and cell["source"] == "clean"]
    bare = next((cell for cell in clean if cell["defence"] == "none"), None)
    chance = 100 / classes
    if bare is None or bare["class_mean"] > chance + SKILL * (100 - chance):
        return []
    says = (
        f"With no defence in front of it, {victim} classifies {bare['accuracy']:.1f}% of {bare['clouds']} "
        f"clean clouds correctly (mean over classes {bare['class_mean']:.1f}%); chance is {chance:.1f}% "
        f"({classes} classes). Usual causes: its training had another order of the classes, another up axis "
        "(here z), or another normalisation (here mean-centred, in the unit sphere)."
    )
    flag = _flag(bare["accuracy"] / 100, says)
    return [{"name": AT_CHANCE, "victim": victim, "defence": cell["defence"], **flag} for cell in clean]


Flag = dict[str, Any] | None


def _flag(share: float, says: str, sources: list[str] | None = None) -> dict[str, Any]:
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
    sources, says, gap = [], [], 0.0
    for weaker, stronger in itertools.combinations(evidence["ladder"], 2):
        more = all(stronger[name] >= weaker[name] for name in ("epsilon", "steps"))
        if more and (difference := _low(stronger["right"], weaker["right"])) > 0:
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
