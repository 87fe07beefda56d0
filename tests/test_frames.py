"""Up axes: of points, networks, classifiers, and of what purifies or classifies clouds with another one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import Tensor, nn

import classifiers
import ifdefense
from benchmarks.foreign import victim_of
from ifdefense import Defended, Mesh, cli, purify
from ifdefense.checkpoints import CheckpointError, load_metadata, stated_axis
from ifdefense.data import read_cloud, write_cloud
from ifdefense.geometry.axes import AXES, turned, turned_mesh
from ifdefense.implicit.anomaly import AnomalyNetwork
from ifdefense.implicit.base import Calibration, field_of, load_network
from ifdefense.point_networks.autoencoder import SHIPPED, AutoEncoder
from ifdefense.purifiers.filters import StatisticalOutlierRemoval
from ifdefense.purifiers.mapped import MappedPurifier
from ifdefense.purifiers.specs import describe, rebuild
from ifdefense.purifiers.surface import SurfacePurifier
from ifdefense.restorers.mesh import MeshRestorer
from ifdefense.training.data.solid_sources import SolidSources
from ifdefense.training.runs import ResumableRun

WEIGHTS = [
    path
    for package in ("ifdefense", "classifiers")
    for path in sorted((Path(__file__).parents[1] / package / "weights").glob("*.safetensors"))
]


def unit(axis: str) -> np.ndarray:
    """The unit vector along an axis."""
    return np.eye(3)["xyz".index(axis[-1])] * (-1 if axis[0] == "-" else 1)


@pytest.mark.parametrize("up", AXES)
@pytest.mark.parametrize("to", AXES)
def test_a_turn_is_a_rotation_that_loses_no_bit(up, to):
    points = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
    points[0, 0] = [0.0, -0.0, 1e-40]
    matrix = turned(np.eye(3), up, to)
    assert np.linalg.det(matrix) == 1.0
    np.testing.assert_array_equal(unit(up) @ matrix, unit(to))
    there = turned(points, up, to)
    np.testing.assert_array_equal(there, points @ matrix.astype(np.float32))
    np.testing.assert_array_equal(turned(there, to, up).view(np.int32), points.view(np.int32))
    np.testing.assert_array_equal(turned(torch.from_numpy(points), up, to).numpy(), there)


def test_y_up_becomes_z_up_by_the_turn_about_x(box_cloud):
    x, y, z = box_cloud.T
    np.testing.assert_array_equal(turned(box_cloud, "y"), np.stack([x, -z, y], 1))
    mesh = turned_mesh(Mesh(np.eye(3), [[0, 1, 2]]), "z", "y")
    np.testing.assert_array_equal(mesh.vertices, [[1, 0, 0], [0, 0, -1], [0, 1, 0]])
    with pytest.raises(ValueError, match="up must be one of z, y, x, -z, -y, -x, got 'Y'"):
        turned(box_cloud, "Y")


@pytest.mark.parametrize("path", WEIGHTS, ids=lambda path: path.stem)
def test_shipped_weights_state_their_axis(path):
    assert load_metadata(path)["up"] == "z"


def test_loaded_networks_and_classifiers_tell_their_axis():
    assert load_network("onet").up_axis == "z"
    assert AutoEncoder.load(SHIPPED).up_axis == "z"
    assert AnomalyNetwork.load().up_axis == "z"
    model = classifiers.load("pointnet-procedural")
    assert model.up_axis == classifiers.fold(model).up_axis == "z"


def test_a_public_classifier_gets_clouds_with_its_own_axis(tmp_path, table_cloud):
    model = classifiers.build("pointnet", 4, feature_transform=False).eval()
    torch.save(model.state_dict(), tmp_path / "mine.pth")
    cloud = torch.from_numpy(table_cloud)[None]
    assert classifiers.load("pointnet", tmp_path / "mine.pth").up_axis is None
    loaded = classifiers.load("pointnet", tmp_path / "mine.pth", up="y")
    expected = model(turned(cloud, "z", "y"))
    torch.testing.assert_close(classifiers.upright(loaded)(cloud), expected)
    assert classifiers.upright(model) is model
    victim, other = (victim_of(f"pointnet:{tmp_path / 'mine.pth'}{axis}") for axis in ("@y", ""))
    assert victim.title == other.title == "pointnet-mine"
    torch.testing.assert_close(victim.model(cloud), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(other.model(cloud), model(cloud), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(expected, model(cloud), rtol=1e-3, atol=1e-5)


def test_public_weights_state_an_axis_only_where_it_is_known(tmp_path):
    state = AutoEncoder(8, 16).state_dict()
    for name, expected in (
        ("mine.pth", None),
        ("onet_pcl2mesh-5c0be168.pt", "y"),
        ("shapenet_3plane.pt", "y"),
        ("onet_mine.pt", None),
    ):
        torch.save(state, tmp_path / name)
        assert stated_axis(tmp_path / name) == expected
        assert AutoEncoder.load(tmp_path / name).up_axis == expected
    save_file(state, tmp_path / "odd.safetensors", {"up": "up"})
    with pytest.raises(CheckpointError, match=r"odd\.safetensors: up must be one of"):
        AutoEncoder.load(tmp_path / "odd.safetensors")


class NoTraining(ResumableRun):
    """A run that only exports what it was given."""

    def _train(self, stop, progress):
        self.position = stop
        return 0.0

    def _validate(self):
        return {"mean": 1.0}


def test_training_writes_the_axis(tmp_path):
    run = NoTraining(nn.Linear(2, 2), {}, {}, 1, 0, tmp_path / "run", metadata={"network": "linear"})
    run()
    run.export(tmp_path / "out.safetensors", "train", "A layer.", [])
    assert load_metadata(tmp_path / "out.safetensors") == {"network": "linear", "up": "z"}


def test_clouds_of_a_folder_are_turned_before_training(tmp_path):
    clouds = np.random.default_rng(4).normal(size=(20, 64, 3)).astype(np.float32)
    np.save(tmp_path / "scans.npy", clouds)
    shapes = SolidSources({"points": 1.0}, None, tmp_path, "estimated", tmp_path / "cache", 1, 0, "y")
    np.testing.assert_array_equal(shapes._read, turned(clouds, "y"))
    assert "--up [z|y|x|-z|-y|-x]" in CliRunner().invoke(cli.main, ["train", "onet", "--help"]).output


class Tower(nn.Module):
    """The field of a solid that is 1 high along its own up axis and 0.4 wide."""

    calibration = Calibration(box=1.2, threshold=0.5, points=None)

    def __init__(self, up_axis: str | None) -> None:
        super().__init__()
        self.up_axis = up_axis
        self.given: list[Tensor] = []

    def encode(self, clouds, seed=0):
        self.given = list(clouds)
        return len(clouds)

    def field(self, code):
        half = torch.tensor([0.2, 0.2, 0.2])
        half["xyz".index((self.up_axis or "z")[-1])] = 0.5
        return lambda points, cloud: 20 * (half - points.abs()).amin(1)


@pytest.mark.parametrize(("axis", "seen"), [("y", "y"), ("x", "x"), ("z", "z"), (None, "z")])
def test_a_network_sees_clouds_and_queries_with_its_own_axis(axis, seen):
    cloud = torch.rand(64, 3, generator=torch.Generator().manual_seed(0)) - 0.5
    network = Tower(axis)
    field = field_of(network, [cloud])
    assert torch.equal(network.given[0], turned(cloud, "z", seen))
    queries = torch.tensor([[0.0, 0.0, 0.4], [0.0, 0.4, 0.0], [0.4, 0.0, 0.0]])
    assert (field(queries, torch.zeros(3, dtype=torch.long)) > 0).tolist() == [True, False, False]
    purifier = SurfacePurifier(network, MeshRestorer(repair=None))
    (trace,) = purifier.trace(turned(cloud, "z", "-x"), up="-x")
    extent = np.ptp(trace.purified, axis=0) / float((cloud.amax(0) - cloud.amin(0)).max())
    np.testing.assert_allclose(extent, [1, 0.4, 0.4], atol=0.05)
    assert np.ptp(trace.mesh.vertices, axis=0).argmax() == 0
    np.testing.assert_array_equal(trace.points, turned(cloud, "z", "-x").numpy())


class Flattened(AutoEncoder):
    """Halves the height along its own up axis."""

    def forward(self, points):
        scale = torch.ones(3)
        scale["xyz".index((self.up_axis or "z")[-1])] = 0.5
        return points * scale


def test_a_point_network_maps_clouds_with_its_own_axis(box_cloud):
    results = []
    for axis in (None, "z", "y", "-y"):
        network = Flattened(8, 16)
        network.up_axis = axis
        results.append(MappedPurifier(network)(box_cloud))
    for result in results[1:]:
        np.testing.assert_allclose(result, results[0], atol=1e-6)
    np.testing.assert_allclose(np.ptp(results[0], axis=0), [1.0, 0.6, 0.2], atol=1e-3)


def test_purify_of_turned_clouds_is_the_turned_result(table_cloud):
    sideways = turned(table_cloud, "z", "y")
    upright = purify(table_cloud, "sor-ae")
    result = purify(sideways, "sor-ae", up="y")
    np.testing.assert_array_equal(result, turned(upright, "z", "y"))
    assert np.abs(purify(sideways, "sor-ae") - result).max() > 0.05
    with pytest.raises(ValueError, match="up must be one of"):
        purify(sideways, "sor-ae", up="w")
    with pytest.raises(TypeError, match="up must be a string"):
        purify(sideways, "sor-ae", up=1)


def test_kept_points_and_attributes_keep_their_bits(table_cloud):
    normals = np.random.default_rng(3).normal(size=table_cloud.shape).astype(np.float32)
    rows = np.concatenate([turned(table_cloud, "z", "y"), normals], 1)
    result = purify(rows, StatisticalOutlierRemoval(), up="y")
    known = {row.tobytes() for row in rows}
    assert all(row.tobytes() in known for row in result)
    assert len({row.tobytes() for row in result}) < len(known)


def test_gradients_pass_a_turn(table_cloud):
    points = torch.from_numpy(turned(table_cloud, "z", "y"))[None].requires_grad_()
    ifdefense.load("sor-ae")(points, up="y").square().sum().backward()
    assert points.grad.abs().sum() > 0


class Recorder(nn.Module):
    """A classifier that keeps what it is given."""

    def __init__(self, up_axis: object = None) -> None:
        super().__init__()
        if up_axis is not None:
            self.up_axis = up_axis
        self.given = torch.zeros(0)

    def forward(self, points):
        self.given = points
        return points.mean(1)


@pytest.mark.parametrize(("axis", "seen"), [(None, "y"), ("z", "z"), ("x", "x")])
def test_defended_turns_clouds_for_purifier_and_classifier(table_cloud, axis, seen):
    sideways = torch.from_numpy(turned(table_cloud, "z", "y"))
    asked = []

    def keep(points, num_points, seed, **options):
        asked.append(options)
        return points

    model = Recorder(axis)
    Defended(model, keep, normalise=False, up="y")(sideways)
    assert asked == [{"up": "y"}]
    assert torch.equal(model.given[0], turned(sideways, "y", seen))
    Defended(model, keep, normalise=False)(sideways)
    assert asked[1] == {}
    assert torch.equal(model.given[0], turned(sideways, "z", axis or "z"))


def test_a_spec_names_another_axis_than_the_usual_one():
    network = load_network("onet")
    assert "up_axis" not in describe(network)
    network.up_axis = "y"
    spec = describe(network)
    assert spec["up_axis"] == "y"
    assert rebuild(spec).up_axis == "y"
    assert rebuild({key: value for key, value in spec.items() if key != "up_axis"}).up_axis == "z"


def test_the_command_line_takes_the_axis(tmp_path, table_cloud):
    sideways = turned(table_cloud, "z", "-y")
    write_cloud(tmp_path / "in.npy", sideways)
    call = ["purify", str(tmp_path / "in.npy"), "-o", str(tmp_path / "out.npy"), "--method", "sor-ae"]
    result = CliRunner().invoke(cli.main, [*call, "--up", "-y"])
    assert result.exit_code == 0, result.output
    np.testing.assert_array_equal(
        read_cloud(tmp_path / "out.npy").astype(np.float32), purify(sideways, "sor-ae", up="-y")
    )
    refused = CliRunner().invoke(cli.main, [*call, "--up", "up"])
    assert refused.exit_code == 2


def test_the_transform_takes_the_axis(table_cloud):
    data = pytest.importorskip("torch_geometric.data", reason="PyTorch Geometric is not installed")
    from ifdefense.transforms import Purify

    transform = Purify("sor-ae", up="y")
    assert str(transform) == "Purify('sor-ae', num_points=None, seed=0, up='y')"
    sideways = torch.from_numpy(turned(table_cloud, "z", "y"))
    result = transform(data.Data(pos=sideways))
    assert torch.equal(result.pos, purify(sideways, "sor-ae", up="y"))
