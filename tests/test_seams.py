"""Public interfaces: extensions in one class, and the contract of purifiers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from quick import CLOUDS, quick
from torch import Tensor, nn

import ifdefense
from ifdefense import Compose, Defended, Purifier, purify
from ifdefense.geometry.frame import Frame
from ifdefense.implicit.base import Calibration, Field, load_network
from ifdefense.implicit.occupancy import OccupancyConfig, OccupancyNetwork
from ifdefense.provenance import digest
from ifdefense.purifiers import registry
from ifdefense.purifiers.base import Outcome
from ifdefense.purifiers.filters import StatisticalOutlierRemoval
from ifdefense.purifiers.registry import METHODS
from ifdefense.purifiers.specs import rebuild
from ifdefense.purifiers.surface import SurfacePurifier
from ifdefense.restorers.base import Restored
from ifdefense.restorers.mesh import MeshRestorer


class VolumeNetwork(nn.Module):
    """A network with a feature volume, as a convolutional Occupancy Network has."""

    calibration = Calibration(box=1.2, threshold=0.5, points=None)

    def __init__(self, resolution: int = 16) -> None:
        super().__init__()
        self.resolution = resolution
        self.layers = nn.Conv3d(1, 1, 3, padding=1, bias=False)
        nn.init.constant_(self.layers.weight, 1.0)

    def encode(self, clouds: Sequence[Tensor], seed: int = 0) -> Tensor:
        """Counts of points in each cell, spread over its neighbours."""
        size = self.resolution
        volumes = []
        for cloud in clouds:
            cell = ((cloud / self.calibration.box + 0.5) * size).long().clamp(0, size - 1)
            flat = (cell[:, 0] * size + cell[:, 1]) * size + cell[:, 2]
            volumes.append(torch.bincount(flat, minlength=size**3).view(1, size, size, size).float())
        return self.layers(torch.stack(volumes))

    def field(self, code: Tensor) -> Field:
        def logits(points: Tensor, cloud: Tensor) -> Tensor:
            cell = ((points / self.calibration.box + 0.5) * self.resolution).long()
            x, y, z = cell.clamp(0, self.resolution - 1).unbind(1)
            return code[cloud, 0, x, y, z] - 0.5

        return logits


class Towards(Purifier):
    """Pulls all points towards the unit cube's centre: a purifier that gradients pass."""

    name = "towards"
    deterministic = True
    differentiable = True

    def __init__(self, factor: float = 0.5) -> None:
        super().__init__()
        self.factor = factor

    def run(self, clouds: list[Tensor], counts: Sequence[int | None], seed: int) -> list[Outcome]:
        return [
            Outcome(self.factor * cloud[torch.arange(count or len(cloud)) % len(cloud)])
            for cloud, count in zip(clouds, counts, strict=True)
        ]


class Bare(Purifier):
    """Has no constructor of its own."""

    name = "bare"

    def run(self, clouds: list[Tensor], counts: Sequence[int | None], seed: int) -> list[Outcome]:
        return [Outcome(cloud) for cloud in clouds]


@dataclasses.dataclass(frozen=True)
class NewtonRestorer:
    """Moves input points onto the level set by Newton steps, x - (f - level) grad f / |grad f|^2."""

    differentiable: ClassVar[bool] = True
    steps: int = 10

    def __call__(
        self,
        field: Field,
        clouds: Sequence[Tensor],
        counts: Sequence[int],
        calibration: Calibration,
        seed: int,
    ) -> list[Restored]:
        restored = []
        for index, (cloud, count) in enumerate(zip(clouds, counts, strict=True)):
            x = cloud[torch.arange(count) % len(cloud)]
            owner = torch.full((count,), index)
            with torch.enable_grad():
                for _ in range(self.steps):
                    x = x if x.requires_grad else x.requires_grad_()
                    height = field(x, owner) - calibration.level
                    (slope,) = torch.autograd.grad(height.sum(), x, create_graph=True)
                    x = x - (height / (slope**2).sum(1).clamp_min(1e-6))[:, None] * slope
            restored.append(Restored(x))
        return restored


class Sphere:
    """The field of a sphere of radius 0.4 about the origin."""

    calibration = Calibration(threshold=0.5)

    def encode(self, clouds: Sequence[Tensor], seed: int = 0) -> None:
        return None

    def field(self, code: None) -> Field:
        return lambda points, cloud: 0.16 - (points**2).sum(1)


@pytest.fixture(scope="module")
def clouds() -> Tensor:
    normal = torch.randn(2, 300, 3, generator=torch.Generator().manual_seed(0))
    return 3 * normal / normal.norm(dim=-1, keepdim=True) + 7


def test_a_convolutional_network_needs_only_its_class(clouds: Tensor) -> None:
    purifier = SurfacePurifier(VolumeNetwork(), MeshRestorer(repair=None), "volume-mesh")
    assert sum(parameter.numel() for parameter in purifier.parameters()) == 27
    traces = purifier.trace(clouds, 128)
    for trace in traces:
        assert trace.mesh is not None and trace.mesh.is_watertight
        distance = np.abs(np.linalg.norm(trace.purified - 7, axis=1) - 3)
        assert distance.max() < 2 * 3**0.5 * 6 * 1.2 / 16  # two diagonals of a cell


def test_gradients_pass_a_differentiable_purifier(clouds: Tensor) -> None:
    points = clouds.double().requires_grad_()
    purifier = Compose([Towards(0.5), Towards(0.5)])
    out = purifier(points)
    centre = Frame.of(clouds[0].double()).centre
    torch.testing.assert_close(out[0], (points[0] - centre) / 4 + centre, rtol=0, atol=1e-6)
    (slope,) = torch.autograd.grad(out[:, 5].sum(), points)
    # Moving one point moves its copy by a quarter; the frame moves with the extreme points alone.
    inner = (points[0] - centre).abs().amax(1) < 2.9
    assert inner[5] and slope[0, 5].tolist() == pytest.approx([0.25] * 3, abs=1e-4)
    assert float(slope[0, inner].sum()) == pytest.approx(0.75, abs=1e-3)
    with torch.no_grad():
        assert not purifier(points).requires_grad


def test_a_purifier_without_gradients_detaches_and_says_so(
    clouds: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    purifier = SurfacePurifier(Sphere(), MeshRestorer(repair=None), "sampled")
    columns = torch.cat([clouds, clouds], 2)
    for call in (purifier, partial(purify, method=purifier)):
        caplog.clear()
        assert not call(columns.clone().requires_grad_(), num_points=64).requires_grad
        (line,) = caplog.messages
        assert line.startswith("sampled is not differentiable, so its result requires no gradients")
    caplog.clear()
    purifier(columns, 64)
    with torch.no_grad():
        purifier(columns.clone().requires_grad_(), 64)
    assert not caplog.messages


def test_attributes_pass_gradients_with_their_points(clouds: Tensor) -> None:
    columns = torch.cat([clouds, clouds], 2).requires_grad_()
    out = purify(columns, "sor", 64)
    (slope,) = torch.autograd.grad(out[..., 3:].sum(), columns)
    assert slope[..., 3:].sum() == 2 * 64 * 3 and slope[..., :3].abs().max() == 0


def test_the_table_says_which_methods_pass_gradients() -> None:
    for name, method in METHODS.items():
        assert ifdefense.load(name).differentiable == method.differentiable, name


def test_points_moved_on_the_field_land_on_it_and_pass_gradients(clouds: Tensor) -> None:
    purifier = SurfacePurifier(Sphere(), NewtonRestorer(), "newton")
    points = clouds.clone().requires_grad_()
    out = purifier(points, 200)
    radius = (out - Frame.of(clouds[0]).centre).norm(dim=-1)
    assert radius[0].sub(0.4 * float(Frame.of(clouds[0]).extent)).abs().max() < 1e-3
    (slope,) = torch.autograd.grad(out[0, 3, 0], points)
    assert slope[0, 3].abs().max() > 0.1 and slope[1].abs().max() == 0


def test_gradients_pass_a_defended_classifier_exactly(clouds: Tensor) -> None:
    class Mean(nn.Module):
        def forward(self, points: Tensor) -> Tensor:
            return (points**3).mean(1)

    model = Defended(Mean(), ifdefense.load("sor-smooth"), normalise=False, seed=0).double()
    points = clouds[:1, :40].double().requires_grad_()
    value = model(points).sum()
    (slope,) = torch.autograd.grad(value, points)
    step = torch.zeros_like(points)
    step[0, 11, 1] = 1e-3
    with torch.no_grad():
        numeric = (model(points + step).sum() - model(points - step).sum()) / 2e-3
    assert float(slope[0, 11, 1]) == pytest.approx(float(numeric), rel=0.02)


def test_the_number_of_points_is_a_promise(clouds: Tensor) -> None:
    class Short(Towards):
        def run(self, clouds: list[Tensor], counts: Sequence[int | None], seed: int) -> list[Outcome]:
            return [Outcome(cloud[:5]) for cloud in clouds]

    with pytest.raises(RuntimeError, match=r"towards returned \(5, 3\) for cloud 0, 9 points were requested"):
        Compose([Towards(), Short()], "towards")(clouds[:1], 9)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_rebuilt_from_its_description(name: str) -> None:
    for purifier in (quick(name), ifdefense.load(name)):
        spec = json.loads(json.dumps(purifier.spec()))
        again = rebuild(spec)
        assert purifier.name == again.name == name and again.spec() == spec
    assert torch.equal(quick(name)(CLOUDS, seed=4), rebuild(quick(name).spec()).eval()(CLOUDS, seed=4))
    for network in (part for part in purifier.modules() if isinstance(part, OccupancyNetwork)):
        network.views = 1
        assert digest(purifier.spec()) != digest(spec) and rebuild(purifier.spec()).spec() == purifier.spec()


def test_methods_have_digests_of_their_own() -> None:
    first, again = ([digest(ifdefense.load(name).spec()) for name in METHODS] for _ in range(2))
    assert len(set(first)) == len(METHODS) and first == again


def test_options_are_the_arguments_of_the_constructor(clouds: Tensor) -> None:
    class Named(Towards):
        def __init__(self, factor: float, *, name: str = "named") -> None:
            super().__init__(factor)
            self.name = name

    class Renamed(Towards):
        def __init__(self, share: float) -> None:
            super().__init__(share)

    assert Towards(0.25).options() == {"factor": 0.25}
    assert Named(0.25).options() == {"factor": 0.25, "name": "named"}
    chain = Compose([Towards(0.25), StatisticalOutlierRemoval(3)], "two")
    assert chain.options()["parts"][1]["options"] == {"k": 3, "alpha": 1.1}
    again = rebuild(chain.spec())
    assert again.name == "two" and torch.equal(again(clouds), chain(clouds))
    assert Bare().options() == {}
    with pytest.raises(TypeError, match="Renamed does not keep its argument 'share' as an attribute"):
        Renamed(0.5).spec()


def test_a_description_knows_other_weights(tmp_path: Any) -> None:
    from ifdefense.checkpoints import save_safetensors

    path = tmp_path / "small.safetensors"
    network = OccupancyNetwork(OccupancyConfig(4, 4, 4))
    metadata = {"network": "occupancy", **Calibration(box=1.3, points=20).metadata()}
    save_safetensors(network, path, metadata)
    purifier = ifdefense.load(path)
    assert load_network(path).calibration == Calibration(box=1.3, points=20)
    spec = purifier.spec()
    torch.nn.init.ones_(network.decoder.fc_out.weight)
    save_safetensors(network, path, metadata)
    with pytest.raises(ValueError, match="differ from those in the spec"):
        rebuild(spec)
    with pytest.raises(ValueError, match="were not loaded from a file"):
        rebuild(SurfacePurifier(network, MeshRestorer()).spec())


def test_selections_come_back_exactly_through_a_chain(clouds: Tensor) -> None:
    far = clouds.double() * 1e-3 + 4e9
    chain = Compose([ifdefense.load("srs"), ifdefense.load("sor")])
    (trace,) = chain.trace(far[0], 50)
    assert {tuple(p) for p in trace.purified} <= {tuple(p) for p in trace.points}
    assert trace.kept_mask.sum() == 300 - 300 * 500 // 1024
    with pytest.raises(ValueError, match="at least one purifier"):
        Compose([])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("threshold", 1.0, "threshold is a probability"),
        ("second_threshold", float("nan"), "second_threshold is a probability"),
        ("box", float("inf"), "box must be a cube around the unit cube"),
        ("box", 1e-9, "box must be a cube around the unit cube"),
        ("offset", 10.0, "offset must be less than half of the box"),
        ("points", 0, "points must be at least 1"),
    ],
)
def test_calibrations_out_of_range_are_errors(field: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Calibration(**{field: value})
    with pytest.raises(ValueError, match="calibration of the weights cannot be read"):
        Calibration.of_metadata({"calibration": "{"})


def test_a_method_without_its_weights_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.LACKING, "dup-net", "punet")
    monkeypatch.delitem(METHODS, "dup-net", raising=False)
    with pytest.raises(ValueError, match=r"dup-net needs weights that are not shipped.*train punet --out"):
        ifdefense.load("dup-net")
