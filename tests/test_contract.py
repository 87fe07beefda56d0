"""What a classifier may return and compute in, and the caller's torch state around an attack."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from attack_checks import CLASSES, SmallNet, carried_out
from torch import Tensor, nn

import attacks
from attacks import Attack, AttackResult
from benchmarks.cells import Cell
from benchmarks.clouds import LabelledClouds
from benchmarks.demo import predict
from benchmarks.foreign import victim_of
from benchmarks.shards import Store, Task, run_shard
from classifiers.adversarial import attacked
from classifiers.options import ClassifierOptions
from classifiers.run import ClassifierRun, accuracy
from ifdefense import Defended
from ifdefense.logits import classify
from ifdefense.training.data.clouds import TrainingClouds


@pytest.fixture(scope="module")
def net() -> SmallNet:
    torch.manual_seed(0)
    net = SmallNet().eval()
    with torch.no_grad():
        net.head[2].bias -= net(CLOUDS).mean(0)
    return net


def clouds(count: int, size: int) -> Tensor:
    points = torch.randn(count, size, 3, generator=torch.Generator().manual_seed(1))
    return points / points.norm(dim=2, keepdim=True)


CLOUDS = clouds(3, 32)

SMALL = {"iterations": 2, "searches": 1, "restarts": 1, "queries": 4, "per_round": 3, "critical": 8}
SMALL |= {"size": 4, "centres": 6, "candidates": 8, "neighbours": 5, "frequencies": 10, "clusters": 2}


def small(kind: type[Any]) -> Attack:
    """An attack of few steps."""
    names = {field.name for field in dataclasses.fields(kind)}
    settings = {name: value for name, value in SMALL.items() if name in names}
    if "num" in names:
        settings["num"] = 2 if "size" in names else 6
    return cast(Attack, kind(**settings))


KINDS = [getattr(attacks, name) for name in attacks.__all__]
ALL = [
    small(kind)
    for kind in KINDS
    if isinstance(kind, type)
    and issubclass(kind, Attack)
    and kind not in (Attack, attacks.Transfer, attacks.WarmStart, attacks.WorstOf)
]
ALL += [attacks.WorstOf((small(attacks.PGD), small(attacks.IFGM)))]
every_attack = pytest.mark.parametrize("attack", ALL, ids=lambda attack: type(attack).__name__)


def run(attack: Attack, model: Callable[[Tensor], Any], points: Tensor = CLOUDS) -> AttackResult:
    labels = classify(model, points).argmax(1)
    return carried_out(attack, model, points, labels, attack.threat.goal != "untargeted")


def same(ours: AttackResult, theirs: AttackResult) -> None:
    assert torch.equal(ours.points, theirs.points) and ours.points.dtype == theirs.points.dtype
    assert torch.equal(ours.success, theirs.success) and torch.equal(ours.queries, theirs.queries)


# What a classifier returns


@dataclass
class Output:
    """As Hugging Face has it: the loss comes first."""

    loss: Tensor | None
    logits: Tensor


Pair = namedtuple("Pair", ["scores", "features"])

FORMS: dict[str, Callable[[Tensor], Any]] = {
    "tuple": lambda logits: (logits, torch.zeros(len(logits), 64, 64)),
    "list": lambda logits: [logits],
    "named tuple": lambda logits: Pair(logits, None),
    "dict": lambda logits: {"features": logits * 0, "logits": logits},
    "ordered dict": lambda logits: OrderedDict(loss=None, logits=logits),
    "dataclass": lambda logits: Output(None, logits),
    "object": lambda logits: SimpleNamespace(logits=logits),
}


class Returning(nn.Module):
    """A classifier that returns its logits in some form."""

    def __init__(self, net: nn.Module, form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net, self.form = net, form

    def forward(self, points: Any) -> Any:
        return self.form(self.net(points))


class Jitter(nn.Module):
    """A purifier that moves all points by one random step."""

    deterministic, differentiable, normalise = False, True, False

    def forward(self, points: Any, num_points: int | None = None, seed: int = 0) -> Any:
        if isinstance(points, list):
            return [self(cloud, num_points, seed) for cloud in points]
        return points + torch.randn(3, generator=torch.Generator().manual_seed(seed)).to(points) / 10


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_logits_are_found_in_what_comes_back(form: Callable[[Tensor], Any], net: SmallNet) -> None:
    model = Returning(net, form)
    same(run(attacks.PGD(iterations=3), model), run(attacks.PGD(iterations=3), net))
    for draws in (1, 3):
        ours, theirs = (Defended(each, Jitter(), seed=2, draws=draws) for each in (model, net))
        for given in (CLOUDS, CLOUDS[0], [CLOUDS[0], CLOUDS[1, :20]], list(CLOUDS), CLOUDS.numpy()):
            if not isinstance(given, np.ndarray):
                assert torch.equal(ours(given), theirs(given))
    aware = [attacks.DefenceAware(each, Jitter(), eot=attacks.EOT(2)) for each in (model, net)]
    same(run(attacks.PGD(iterations=2), aware[0]), run(attacks.PGD(iterations=2), aware[1]))


@every_attack
def test_every_attack_takes_a_classifier_with_features(attack: Attack, net: SmallNet) -> None:
    same(run(attack, Returning(net, FORMS["tuple"])), run(attack, net))


def test_surrogates_and_plain_functions_may_return_tuples(net: SmallNet) -> None:
    attack = attacks.PGD(iterations=3)
    expected = run(attacks.Transfer(attack, net), net)
    same(
        run(attacks.Transfer(attack, Returning(net, FORMS["tuple"])), lambda points: [net(points)]), expected
    )


def test_a_batch_of_graphs(net: SmallNet) -> None:
    geometric = pytest.importorskip("torch_geometric.data")
    batch = geometric.Batch.from_data_list([geometric.Data(pos=cloud) for cloud in CLOUDS])

    def graphs(data: Any) -> Any:
        return net(data.pos.view(3, -1, 3)), data.batch

    def moved(data: Any, num_points: int | None, seed: int) -> Any:
        return data

    assert torch.equal(Defended(graphs, moved, normalise=False)(batch), net(CLOUDS))
    with pytest.raises(ValueError, match=r"logits of shape \(3, C\), it returned \(1, 4\)"):
        Defended(lambda data: graphs(data)[0][:1], moved, normalise=False)(batch)


WRONG: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "scores per point": (lambda logits: logits[:, None], r"it returned \(3, 1, 4\)"),
    "too few": (lambda logits: logits[:1], r"it returned \(1, 4\)"),
    "classes": (lambda logits: logits.argmax(1)[:, None], r"it returned \(3, 1\) torch.int64"),
    "features first": (
        lambda logits: (logits[:, None], logits),
        r"it returned a tuple of \(3, 1, 4\), \(3, 4\)",
    ),
    "nothing": (lambda logits: None, "it returned a NoneType"),
    "nobody": (lambda logits: (), "it returned a tuple;"),
    "another name": (
        lambda logits: {"out": logits, "aux": 1},
        r"it returned a dict of 'out': \(3, 4\), 'aux': int",
    ),
    "an array": (lambda logits: logits.detach().numpy(), "it returned a ndarray"),
    "a loss": (lambda logits: Output(logits, logits.sum()), "it returned a Output"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_are_no_logits_is_said(name: str, net: SmallNet) -> None:
    form, message = WRONG[name]
    model = Returning(net, form)
    labels = torch.zeros(3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"must return logits of shape \(3, C\), " + message):
        attacks.PGD()(model, CLOUDS, labels)
    with pytest.raises(ValueError, match=r"must return logits of shape \(3, C\), " + message):
        Defended(model, Jitter())(CLOUDS)


def test_taking_logits_out_is_logged_for_those_who_debug(
    net: SmallNet, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        classify(Returning(net, FORMS["tuple"]), CLOUDS)
        classify(net, CLOUDS)
    assert [record.levelname for record in caplog.records] == ["DEBUG"]
    assert caplog.messages == ["the model returned a tuple; the first element is taken for the logits"]


def test_training_and_measurements_take_tuples(net: SmallNet, tmp_path: Path) -> None:
    model = Returning(net, FORMS["tuple"])
    labels = net(CLOUDS).argmax(1)
    assert accuracy(model, TrainingClouds(CLOUDS, labels)) == 1
    assert torch.equal(predict(model, CLOUDS), labels)
    targets = (labels + 1) % CLASSES
    names = tuple(map(str, range(CLASSES)))
    labelled = LabelledClouds("made", CLOUDS, labels, targets, names)
    task = Task("scored", Cell("model", "clean", "none"), 0, labelled, victim_of(model))
    run_shard(task, Store(tmp_path))
    scored = Store(tmp_path).read(task.path)
    assert scored is not None and scored["predicted"].tolist() == [labels.tolist()]
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    ours, theirs = (
        attacked(each, CLOUDS, labels, 0.1, 2, generator)
        for each, generator in zip((model, net), generators, strict=True)
    )
    assert torch.equal(ours, theirs)

    data = TrainingClouds(clouds(8, 32), torch.arange(8) % CLASSES)
    options = ClassifierOptions(schedule=((32, 1),), batch_size=4)
    fresh = Returning(SmallNet(), FORMS["tuple"])
    best = ClassifierRun(fresh, data, {"validation": data}, options, tmp_path)(progress=False)
    assert 0 <= best["validation"] <= 1


# Precision of the classifier


@every_attack
@pytest.mark.parametrize("points", [torch.float64, torch.float32])
def test_clouds_and_classifiers_of_different_precision(
    attack: Attack, points: torch.dtype, net: SmallNet
) -> None:
    given = CLOUDS.to(points)
    other = torch.float32 if points == torch.float64 else torch.float64
    model = SmallNet().eval().to(other)
    model.load_state_dict(net.state_dict())
    result = run(attack, model, given)
    assert result.points.dtype == points
    same(result, run(attack, lambda clouds: model(clouds.to(other)).to(points), given))


@pytest.mark.parametrize("weights", [torch.float16, torch.bfloat16])
def test_weights_of_half_precision(weights: torch.dtype) -> None:
    model = SmallNet().eval().to(weights)
    result = run(attacks.APGD(iterations=3), model)
    assert result.points.dtype == torch.float32 and not torch.equal(result.points, CLOUDS)


def test_gradients_of_a_defence_are_in_the_precision_of_the_points(net: SmallNet) -> None:
    for make in (Defended, attacks.DefenceAware):
        leaf = CLOUDS.double().requires_grad_()
        logits = cast(Any, make)(net, Jitter(), seed=0)(leaf)
        assert logits.dtype == torch.float32
        (gradient,) = torch.autograd.grad(logits.sum(), leaf)
        assert gradient.dtype == torch.float64 and gradient.any()


def test_a_defence_hands_clouds_to_its_purifier_as_they_are(net: SmallNet) -> None:
    seen = set()

    class Noting(Jitter):
        """Has weights, of another precision than the clouds."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, points: Tensor, num_points: int | None = None, seed: int = 0) -> Tensor:
            seen.add(points.dtype)
            return points

    def double(points: Tensor) -> Tensor:
        return points.mean(1) @ torch.eye(3, CLASSES, dtype=torch.float64)

    for model in (Defended(double, Noting(), normalise=False), attacks.DefenceAware(double, Noting())):
        result = run(attacks.PGD(iterations=2), model, CLOUDS.double())
        assert result.points.dtype == torch.float64 and seen == {torch.float64}


def test_an_auto_encoder_of_another_precision(net: SmallNet) -> None:
    class Shrinking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.full((3,), 0.9))

        def forward(self, points: Tensor) -> Tensor:
            assert points.dtype == self.factor.dtype
            return points * self.factor

    attack = attacks.AdvPC(iterations=2, restarts=1, autoencoder=Shrinking())
    assert run(attack, net, CLOUDS.double()).points.dtype == torch.float64


# The caller's torch state


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


STATES: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "inference": torch.inference_mode,
    "no grad": torch.no_grad,
    "double": lambda: default_dtype(torch.float64),
    "device": lambda: torch.device("meta"),
}


@every_attack
@pytest.mark.parametrize("state", STATES)
def test_the_callers_state_changes_nothing(attack: Attack, state: str, net: SmallNet) -> None:
    labels = net(CLOUDS).argmax(1)
    targeted = attack.threat.goal != "untargeted"
    expected = carried_out(attack, net, CLOUDS, labels, targeted)
    with STATES[state]():
        # What is made in inference mode itself cannot be differentiated.
        result = carried_out(attack, net, CLOUDS.clone(), labels.clone(), targeted)
        assert not result.points.is_inference()
    same(result, expected)


class Mixed(nn.Module):
    """A classifier with an autocast of its own."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, points: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return cast(Tensor, self.net(points))


@every_attack
def test_autocast_is_for_the_classifier_alone(attack: Attack, net: SmallNet) -> None:
    labels = net(CLOUDS).argmax(1)
    targeted = attack.threat.goal != "untargeted"
    expected = carried_out(attack, Mixed(net), CLOUDS, labels, targeted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same(carried_out(attack, net, CLOUDS, labels, targeted), expected)
        assert torch.is_autocast_enabled("cpu")


def test_autocast_reaches_the_classifier_behind_a_defence_and_not_the_purifier(net: SmallNet) -> None:
    states = []

    class Noting(Jitter):
        def forward(self, points: Any, num_points: int | None = None, seed: int = 0) -> Any:
            states.append(torch.is_autocast_enabled("cpu"))
            return super().forward(points, num_points, seed)

    for make in (
        lambda each: Defended(each, Noting(), seed=1),
        lambda each: attacks.DefenceAware(each, Noting()),
    ):
        expected = run(attacks.PGD(iterations=2), make(Mixed(net)))
        labels = make(net)(CLOUDS).argmax(1)
        states.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = carried_out(attacks.PGD(iterations=2), make(net), CLOUDS, labels, True)
        same(result, expected)
        assert states and not any(states)


def test_the_classifier_sees_the_callers_default_device(net: SmallNet) -> None:
    seen = []

    def model(points: Tensor) -> Tensor:
        seen.append(torch.empty(1).device.type)
        return net(points)

    labels = net(CLOUDS).argmax(1)
    with torch.device("meta"):
        attacks.FGM()(model, CLOUDS, labels)
        assert torch.empty(1).is_meta
    assert set(seen) == {"meta"}


def test_weights_made_in_inference_mode_are_named() -> None:
    with torch.inference_mode():
        model = SmallNet()
        labels = torch.zeros(3, dtype=torch.long)
        with pytest.raises(ValueError, match="its weights were made in inference mode"):
            attacks.PGD()(model, CLOUDS, labels)
        assert model.training and all(weight.requires_grad for weight in model.parameters())
        assert attacks.RandomDrop(6)(model, CLOUDS, labels).points.shape == (3, 26, 3)


def test_many_clouds_in_inference_mode(net: SmallNet, tmp_path: Path) -> None:
    labels = net(CLOUDS).argmax(1)
    attack = attacks.PGD(iterations=2)
    expected = attack(net, CLOUDS, labels)
    with torch.inference_mode():
        for _ in range(2):  # the second time from the cache
            result = attacks.attack_in_batches(
                attack, net, CLOUDS.clone(), labels.clone(), batch_size=3, folder=tmp_path
            )
            assert torch.equal(result.points, expected.points) and not result.points.is_inference()


# Classifiers of other programs


class InPlace(nn.Module):
    """A classifier that centres its input where it is."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, points: Tensor) -> Any:
        points -= points.mean(1, keepdim=True)
        return self.net(points)


class Centring(InPlace):
    def forward(self, points: Tensor) -> Any:
        return self.net(points - points.mean(1, keepdim=True))


@pytest.mark.parametrize("kind", [attacks.PGD, attacks.Square, attacks.SaliencyDrop])
def test_a_classifier_that_works_in_place(kind: type[Attack], net: SmallNet) -> None:
    labels = Centring(net)(CLOUDS).argmax(1)
    before = CLOUDS.clone()
    ours, theirs = (small(kind)(model(net), CLOUDS, labels) for model in (InPlace, Centring))
    same(ours, theirs)
    assert torch.equal(CLOUDS, before)


@every_attack
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_clouds_of_half_precision(attack: Attack, dtype: torch.dtype, net: SmallNet) -> None:
    given = CLOUDS.to(dtype)
    ours, theirs = run(attack, net, given), run(attack, net, given.float())
    assert ours.points.dtype == dtype
    assert torch.equal(ours.points, theirs.points.to(dtype))


def test_a_compiled_classifier_has_a_cache(net: SmallNet, tmp_path: Path) -> None:
    labels = net(CLOUDS).argmax(1)
    model = torch.compile(net, backend="eager")
    for _ in range(2):
        attacks.attack_in_batches(small(attacks.FGM), model, CLOUDS, labels, batch_size=3, folder=tmp_path)
        assert len(list(tmp_path.iterdir())) == 1
    other = torch.compile(SmallNet().eval(), backend="eager")
    attacks.attack_in_batches(small(attacks.FGM), other, CLOUDS, labels, batch_size=3, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "wrap",
    [lambda net: torch.compile(net, backend="eager"), nn.DataParallel],
    ids=["compiled", "parallel"],
)
def test_wrapped_classifiers(wrap: Callable[[nn.Module], Any], net: SmallNet) -> None:
    same(run(attacks.PGD(iterations=3), wrap(net)), run(attacks.PGD(iterations=3), net))
