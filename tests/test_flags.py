"""Every flag with something that raises it and something that does not."""

from __future__ import annotations

import functools
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import sample_box
from quick import quick
from torch import Tensor, nn
from torch.autograd import Variable, grad

from attacks import FunctionPurifier
from benchmarks import flags, probing
from benchmarks.foreign import defence_of
from ifdefense.geometry.frame import to_unit_sphere

SIDES = [(1.0, 0.5 + 0.05 * i, 0.5) if i % 2 else (1.0, 0.9, 0.6 + 0.05 * i) for i in range(8)]
POINTS = to_unit_sphere(
    torch.from_numpy(np.stack([sample_box(sides, 160, np.random.default_rng(0)) for sides in SIDES]))
)
CLOUDS = SimpleNamespace(points=POINTS, labels=torch.arange(8) % 2)
TWO = SimpleNamespace(points=POINTS[:2], labels=CLOUDS.labels[:2])
Cell = dict[str, Any]


def moments(points: Tensor) -> Tensor:
    return (points.mT @ points).flatten(1) / points.shape[1]


class Moments(nn.Module):
    """A smooth classifier of boxes: the nearer mean of a class in the moments of the points."""

    def __init__(self, sharpness: float = 20) -> None:
        super().__init__()
        self.sharpness = sharpness
        own = moments(POINTS)
        self.means = torch.stack([own[CLOUDS.labels == label].mean(0) for label in (0, 1)])

    def forward(self, points: Tensor) -> Tensor:
        return -self.sharpness * (moments(points)[:, None] - self.means).square().sum(2).mul(20)


VICTIM = SimpleNamespace(title="boxes", model=Moments())


def purifier(function: Any, **properties: Any) -> FunctionPurifier:
    return FunctionPurifier(
        lambda points, num_points, seed: function(points), **({"deterministic": True} | properties)
    )


def evidence(defence: Any = None, victim: Any = VICTIM, clouds: Any = TWO) -> dict[str, Any]:
    """Evidence, which has to survive as JSON."""
    found = probing.probe(victim, defence, clouds, 0)
    assert json.loads(json.dumps(found)) == found
    return found


def raised(defence: Any = None, victim: Any = VICTIM, clouds: Any = TWO, cells: Any = ()) -> set[str]:
    found = flags.flags(evidence(defence, victim, clouds), list(cells))
    assert json.loads(json.dumps(found)) == found
    assert all(flag["says"].endswith(".") and flag["share"] >= 0 for flag in found)
    return {flag["name"] for flag in found}


def cell(source: str, right: str, **fields: Any) -> Cell:
    """A cell of the grid: ten clouds, one draw."""
    return {
        "victim": "boxes",
        "source": source,
        "title": source.upper(),
        "defence": "defence",
        "knowledge": "static",
        "right": [right],
        "budget": {"norm": "linf", "epsilon": 0.05},
        "settings": "PGD()",
        "passes": 50,
        "success": 95.0,
        **fields,
    }


EOT_CELL = cell("pgd-linf", "0" * 10, knowledge="eot")


@functools.cache
def honest() -> dict[str, Any]:
    """Evidence of the classifier alone, for flags that depend on cells."""
    return evidence() | {"defence": "defence"}


def of_cells(*cells: Cell) -> dict[str, list[str]]:
    return {flag["name"]: flag["sources"] for flag in flags.flags(honest(), list(cells))}


def test_a_plain_classifier_raises_nothing() -> None:
    assert raised(clouds=CLOUDS) == set()


@pytest.mark.parametrize("method", ["local-mesh", "local-random", "sor", "sor-smooth", "srs"])
def test_our_methods_raise_nothing(method: str) -> None:
    defence = quick(method)
    one = SimpleNamespace(points=POINTS[:1], labels=CLOUDS.labels[:1])
    found = evidence(defence, clouds=one)
    assert found["difference"] == 0 or not defence.deterministic
    own = EOT_CELL | {"defence": defence.name}
    assert flags.flags(found, [own]) == []


# The three cheats


def rounded(points: Tensor) -> Tensor:
    return (points / 0.2).round() * 0.2


def rounded_by_numpy(points: Tensor) -> Tensor:
    return torch.from_numpy(np.round(points.detach().numpy() / 0.2) * np.float32(0.2))


@pytest.mark.parametrize("function", [rounded, rounded_by_numpy])
@pytest.mark.parametrize("declared", [True, False])
def test_points_on_a_grid_mask_gradients(function: Any, declared: bool) -> None:
    assert "masked-gradients" in raised(purifier(function, differentiable=declared))


@pytest.mark.parametrize("function", [rounded, rounded_by_numpy])
def test_a_foreign_function_is_examined_like_any_other(function: Any) -> None:
    assert "masked-gradients" in raised(defence_of(function))
    assert raised(defence_of(centred)) == set()


def centred(points: Tensor) -> Tensor:
    return points - points.mean(1, keepdim=True)


@pytest.mark.parametrize("factor", [1e3, 1e6])
def test_a_saturated_softmax_masks_gradients(factor: float) -> None:
    saturated = SimpleNamespace(title="boxes", model=Moments(20 * factor))
    assert raised(victim=saturated) >= {"masked-gradients", "unbounded-attack-fails"}


def test_probabilities_count_as_saturated() -> None:
    sure = nn.Sequential(Moments(), nn.Softmax(1))
    found = evidence(victim=SimpleNamespace(title="boxes", model=sure))
    assert found["saturated"] == 1
    logarithms = nn.Sequential(Moments(), nn.LogSoftmax(1))
    assert evidence(victim=SimpleNamespace(title="boxes", model=logarithms))["saturated"] == 0


def test_noise_needs_eot() -> None:
    def noisy(points: Tensor, num_points: int | None, seed: int) -> Tensor:
        return points + 0.05 * torch.randn(points.shape, generator=torch.Generator().manual_seed(seed))

    defence = FunctionPurifier(noisy, deterministic=False)
    assert raised(defence) == {"random-without-eot"}
    other = cell("pgd-linf", "0", knowledge="straight-through")
    assert raised(defence, cells=[other]) == {"random-without-eot"}
    assert raised(defence, cells=[EOT_CELL]) == set()


def test_noise_without_a_seed_is_noticed_under_eot_too() -> None:
    noisy = purifier(lambda points: points + 0.05 * torch.randn_like(points), deterministic=False)
    noisy.takes_seed = False
    assert raised(noisy, cells=[EOT_CELL]) == {"random-without-seed"}


def test_noise_from_no_seed_is_noticed() -> None:
    noisy = purifier(lambda points: points + 0.05 * torch.randn_like(points))  # declared deterministic
    assert "random-without-eot" in raised(noisy)


# Gradients


def test_a_gradient_that_is_not_finite_is_masked() -> None:
    """The root has an infinite slope at 0."""
    broken = purifier(lambda points: points + (0 * points).abs().sqrt(), differentiable=True)
    found = evidence(broken)
    assert found["gradients"]["exact"] == {"zero": 0, "not finite": 1}
    assert "masked-gradients" in {flag["name"] for flag in flags.flags(found, [])}


def test_a_promised_gradient_that_is_missing_is_masked() -> None:
    detached = purifier(lambda points: points.detach() * 1, differentiable=True)
    assert evidence(detached)["gradients"] == {
        "straight-through": {"zero": 0, "not finite": 0},
        "exact": {"zero": 1, "not finite": 0},
    }
    undeclared = purifier(lambda points: points.detach() * 1)
    assert raised(undeclared) == set()  # the attacker passes by


def test_one_cloud_in_five_is_masked() -> None:
    found = honest() | {"gradients": {"exact": {"zero": 0.2, "not finite": 0.0}}}
    assert [flag["name"] for flag in flags.flags(found, [])] == ["masked-gradients"]
    found = honest() | {"gradients": {"exact": {"zero": 0.19, "not finite": 0.0}}}
    assert flags.flags(found, []) == []


# Attacks of growing strength


def test_a_cloud_that_cannot_be_lost_fails_the_unbounded_attack() -> None:
    known = purifier(lambda points: POINTS[:2][: len(points)] + 0 * points)
    assert "unbounded-attack-fails" in raised(known)


def test_more_is_weaker_for_a_defence_against_large_shifts() -> None:
    def restored(points: Tensor) -> Tensor:
        """The nearest clean cloud, but only for clouds with points far from it."""
        shift = (points[:, None] - POINTS).norm(dim=3).amax(2)
        nearest = shift.argmin(1)
        far = shift.amin(1) > 0.25
        return torch.where(far[:, None, None], POINTS[nearest], points)

    found = raised(purifier(restored), clouds=CLOUDS)
    assert "more-is-weaker" in found


def test_one_step_that_beats_several_is_noticed() -> None:
    rungs = [(0.1, 1, "00000000"), (0.3, 3, "00000000"), (0.1, 6, "11111111")]
    ladder = [{"epsilon": epsilon, "steps": steps, "right": right} for epsilon, steps, right in rungs]
    (flag,) = flags.flags(honest() | {"ladder": ladder}, [])
    assert flag["name"] == "more-is-weaker"
    assert flag["says"].startswith("PGD with L∞ 0.1 and 6 steps leaves more clouds than with 0.1 and 1.")
    for rung in ladder:
        rung["right"] = rung["right"].replace("1", "0")
    assert flags.flags(honest() | {"ladder": ladder}, []) == []


def test_small_steps_are_made_only_where_they_can_tell_something() -> None:
    walk, small = [(0.1, 1), (0.3, 3), (0.6, 6)], (0.1, 6)

    def made(found: dict[str, Any]) -> list[tuple[float, int]]:
        return [(rung["epsilon"], rung["steps"]) for rung in found["ladder"]]

    # The first step leaves none of eight clouds, where small ones could leave more; two clouds show nothing.
    assert made(evidence(clouds=CLOUDS)) == [*walk, small]
    assert made(evidence(clouds=TWO)) == walk


def test_more_is_weaker_in_cells() -> None:
    small = cell("pgd-linf", "0000000000", settings="PGD(epsilon=0.05)")
    large = cell("pgd-linf", "1111111111", budget={"norm": "linf", "epsilon": 0.1})
    assert of_cells(small, large) == {"more-is-weaker": ["pgd-linf"]}
    long = cell("pgd-linf", "1111111111", passes=200)
    assert of_cells(small, long) == {"more-is-weaker": ["pgd-linf"]}
    assert of_cells(small, large | {"right": ["0000000000"]}) == {}
    assert of_cells(small, large | {"right": ["1000000000"]}) == {}  # by chance
    assert of_cells(small, large | {"settings": "APGD()"}) == {}  # another attack
    assert of_cells(small, large | {"budget": {"norm": "l2", "epsilon": 1.25}}) == {}


# Attacks against each other


def test_black_box_against_white_box() -> None:
    black = cell("square", "0000000000", knowledge="straight-through")
    white = cell("pgd-linf", "1111111111", knowledge="straight-through")
    assert of_cells(black, white) == {"black-box-beats-white-box": ["square"]}
    assert of_cells(black, white | {"right": ["1000000000"]}) == {}
    # One of several attacks by gradients is enough, and a smaller budget does not count.
    assert of_cells(black, white, cell("apgd-ce", "0000000000", knowledge="exact")) == {}
    assert of_cells(black, white | {"budget": {"norm": "linf", "epsilon": 0.01}}) == {}
    transferred = cell("pgd-linf", "0000000000", knowledge="transfer:sor")
    assert of_cells(transferred, white) == {"black-box-beats-white-box": ["pgd-linf"]}


def test_adaptive_against_static() -> None:
    static, adaptive = cell("pgd-linf", "0000000000"), cell("pgd-linf", "1111111111", knowledge="eot")
    assert of_cells(static, adaptive) == {"adaptive-above-static": ["pgd-linf"]}
    assert of_cells(static, adaptive | {"right": ["1000000000"]}) == {}
    other = adaptive | {"knowledge": "straight-through", "right": ["0000000000"]}
    assert of_cells(static, adaptive, other) == {}
    assert of_cells(static, adaptive | {"source": "pgd-untargeted"}) == {}


def test_draws_and_numbers_of_clouds_may_differ() -> None:
    static = cell("pgd-linf", "000000000011111")
    adaptive = cell("pgd-linf", "1111111111", knowledge="eot") | {"right": ["1111111111", "1111111110"]}
    assert of_cells(static, adaptive) == {"adaptive-above-static": ["pgd-linf"]}


def test_an_attack_that_is_weak_without_a_defence() -> None:
    bare = cell("knn", "1" * 10, defence="none", success=42.0)
    assert of_cells(bare) == {"weak-attack": ["knn"]}
    assert of_cells(bare | {"success": 80.0}) == {}
    assert of_cells(bare | {"victim": "another"}) == {}
    assert of_cells(bare | {"defence": "defence"}) == {}  # success is low because of the defence


# Optimisation at inference


def by_grad(points: Tensor) -> Tensor:
    with torch.enable_grad():
        moved = points.detach().clone().requires_grad_()
        for _ in range(3):
            (slope,) = grad(moved.square().sum(), moved)  # imported by name
            moved = moved - 0.001 * slope
    return moved.detach()


def by_backward(points: Tensor) -> Tensor:
    with torch.enable_grad():
        moved = points.detach().clone().requires_grad_()
        moved.square().sum().backward()
    return (moved - 0.001 * moved.grad).detach()  # type: ignore[operator]


@pytest.mark.parametrize("function", [by_grad, by_backward])
def test_an_inner_optimisation_is_seen(function: Any) -> None:
    engine = Variable._execution_engine
    assert "optimises" in raised(purifier(function))
    assert Variable._execution_engine is engine


def test_onet_opt_optimises() -> None:
    with torch.no_grad(), probing.engine_calls() as calls:
        quick("onet-opt")(POINTS[:1])
    assert calls.count >= 3
    found = honest() | {"optimises": {"declared": False, "calls": calls.count}}
    assert [flag["name"] for flag in flags.flags(found, [])] == ["optimises"]


def test_an_optimisation_can_be_declared() -> None:
    defence = purifier(lambda points: points * 1)
    defence.optimises = True
    assert raised(defence) == {"optimises"}


# The classifier's frame


@pytest.mark.parametrize("change", [lambda points: 1.3 * points, lambda points: points + 0.1])
def test_a_cloud_out_of_the_frame(change: Any) -> None:
    assert "leaves-frame" in raised(purifier(change))
    assert "leaves-frame" not in raised(purifier(change, normalise=True))


def test_a_cloud_within_the_frame() -> None:
    assert raised(purifier(lambda points: 1.05 * points)) == set()


# A classifier that recognises nothing


def clean(accuracy: float, class_mean: float, **fields: Any) -> Cell:
    measured = {"clouds": 40, "accuracy": accuracy, "class_mean": class_mean}
    return cell("clean", "", defence="none", knowledge="none", **measured) | fields


@pytest.mark.parametrize(
    ("classes", "accuracy", "class_mean", "expected"),
    [
        (40, 0.0, 0.0, True),
        (40, 18.3, 13.9, True),  # the shipped PointNet on ModelNet40 with y up
        (40, 47.5, 37.9, False),
        (2, 90.0, 50.0, True),  # always the most frequent class
        (2, 75.0, 75.0, False),
    ],
)
def test_a_classifier_at_chance(classes: int, accuracy: float, class_mean: float, expected: bool) -> None:
    bare = clean(accuracy, class_mean)
    found = flags.at_chance("boxes", classes, [bare, bare | {"defence": "defence", "class_mean": 100.0}])
    assert [flag["defence"] for flag in found] == ["none", "defence"] * expected
    for flag in found:
        assert flag["name"] == "victim-at-chance" and flag["victim"] == "boxes" and flag["sources"] == []
        for words in ("boxes", f"{accuracy}%", f"chance is {100 / classes:.1f}%", "order", "up axis"):
            assert words in flag["says"]


def test_only_the_bare_classifier_and_clean_clouds_count() -> None:
    good, bad = clean(95.0, 95.0), clean(0.0, 0.0)
    others = [bad | {"defence": "defence"}, bad | {"source": "pgd-linf"}, bad | {"victim": "another"}]
    assert flags.at_chance("boxes", 8, [good, *others]) == flags.at_chance("boxes", 8, others) == []
