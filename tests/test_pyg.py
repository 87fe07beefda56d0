"""PyTorch Geometric: Data and Batch through purifiers, data sets and loaders."""

from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ifdefense
from ifdefense import Defended, purify
from ifdefense.geometry.frame import to_unit_sphere
from ifdefense.provenance import digest

pytest.importorskip(
    "torch_geometric", reason="PyTorch Geometric is not installed: pip install torch-geometric"
)

import torch_geometric.transforms as T
from torch_geometric.data import Batch, Data, HeteroData
from torch_geometric.datasets import ModelNet
from torch_geometric.loader import DataLoader
from torch_geometric.transforms import BaseTransform

from ifdefense.transforms import Purify

ROOT = Path(__file__).parent.parent
SIZES = (200, 120, 90)


def cloud(size: int, seed: int = 0) -> Data:
    """A ball with features that name its points, attributes of the cloud, and no edges."""
    generator = torch.Generator().manual_seed(seed)
    pos = torch.nn.functional.normalize(torch.randn(size, 3, generator=generator)) * (seed + 1)
    return Data(
        pos=pos,
        x=torch.stack([pos[:, 0], torch.arange(size).float()], 1),
        number=torch.arange(size),
        y=torch.tensor([seed]),
        name=f"ball {seed}",
    )


def clouds() -> list[Data]:
    return [cloud(size, seed) for seed, size in enumerate(SIZES)]


def assert_same(ours: Data, theirs: Data) -> None:
    assert ours.keys() == theirs.keys()
    for key in theirs.keys():  # noqa: SIM118 - not a dictionary
        if isinstance(theirs[key], Tensor):
            assert torch.equal(ours[key], theirs[key]), key
        else:
            assert ours[key] == theirs[key], key


@pytest.mark.parametrize("method", ["sor", "sor-smooth", "onet-fill"])
def test_data_is_purified_and_the_rest_follows(method: str) -> None:
    data = cloud(200)
    before = copy.deepcopy(data)
    clean = purify(data, method, num_points=150, seed=2)
    assert_same(data, before)
    assert isinstance(clean, Data) and clean.num_nodes == 150
    assert torch.equal(clean.pos, purify(data.pos, method, num_points=150, seed=2))
    assert torch.equal(clean.x, data.x[clean.number])
    distance = torch.cdist(clean.pos.double(), data.pos.double())
    torch.testing.assert_close(distance[torch.arange(150), clean.number], distance.amin(1))
    assert torch.equal(clean.y, data.y) and clean.name == data.name
    assert (method == "sor") == torch.equal(clean.pos, data.pos[clean.number])


@pytest.mark.parametrize("num_points", [None, 64])
def test_a_batch_is_its_clouds(num_points: int | None) -> None:
    batch = Batch.from_data_list(clouds(), follow_batch=["x"])
    clean = purify(batch, "sor", num_points, seed=1)
    apart = [purify(data, "sor", num_points, seed=1) for data in clouds()]
    assert type(clean) is type(batch) and clean.num_graphs == 3
    assert_same(clean, Batch.from_data_list(apart, follow_batch=["x"]))
    for ours, theirs in zip(clean.to_data_list(), apart, strict=True):
        assert_same(ours, theirs)
    assert batch.num_nodes == sum(SIZES)


def test_a_batch_vector_is_enough() -> None:
    """As in a forward pass: no `Batch`, but positions and a vector."""
    joint = Batch.from_data_list(clouds())
    data = Data(pos=joint.pos.double(), batch=joint.batch, x=joint.x)
    clean = purify(data, "srs", 40)
    expected = purify(joint, "srs", 40)
    assert clean.batch.tolist() == [0] * 40 + [1] * 40 + [2] * 40
    assert torch.equal(clean.pos, expected.pos.double()) and torch.equal(clean.x, expected.x)
    assert clean.pos.dtype == torch.float64


def test_attributes_that_a_batch_was_given_later_follow() -> None:
    batch = Batch.from_data_list(clouds())
    batch.later = torch.arange(sum(SIZES))
    batch.labels = torch.arange(3)
    clean = purify(batch, "sor")
    assert torch.equal(clean.pos, batch.pos[clean.later]) and clean.labels.tolist() == [0, 1, 2]


def test_lists_arrays_counts_and_lists_of_nodes() -> None:
    data = cloud(100)
    data.names = [f"point {i}" for i in range(100)]
    data.array = np.arange(100)
    data.num_nodes = 100
    clean, array = purify([data, data.pos.numpy()], "sor", 60)
    assert clean.names == [f"point {i}" for i in clean.number.tolist()]
    np.testing.assert_array_equal(clean.array, clean.number.numpy())
    assert clean.num_nodes == 60 and isinstance(array, np.ndarray)
    back = purify(Batch.from_data_list([data, data]), "sor", 60).to_data_list()
    assert [part.num_nodes for part in back] == [60, 60]


def test_gradients_pass_a_batch() -> None:
    batch = Batch.from_data_list(clouds())
    batch.pos.requires_grad_()
    clean = ifdefense.load("sor")(batch, 50)
    clean.pos.sum().backward()
    assert batch.pos.grad.sum() == 3 * 150
    assert len(ifdefense.load("sor").trace(batch)) == 3


def broken(**changes: Any) -> Data:
    data = cloud(50)
    for key, value in changes.items():
        data[key] = value
    return data


ERRORS: dict[str, tuple[Any, type[Exception], str]] = {
    "edges": (
        broken(edge_index=torch.zeros(2, 7).long()),
        ValueError,
        "the data has edge_index.*before the graph is built",
    ),
    "faces": (broken(face=torch.zeros(3, 4).long()), ValueError, "has face.*sample its surface first"),
    "numbers": (broken(node_index=torch.arange(50)), ValueError, "has node_index"),
    "no positions": (Data(x=torch.rand(50, 3)), TypeError, "no positions: expected a tensor in data.pos"),
    "flat": (broken(pos=torch.rand(50, 2)), ValueError, r"pos must have shape \(N, 3\), got \(50, 2\)"),
    "heterogeneous": (HeteroData(), TypeError, "is a HeteroData: expected Data or Batch"),
    "few points": (cloud(9), ValueError, "the cloud has 9 distinct points"),
    "member": ([cloud(50), cloud(9)], ValueError, "cloud 1 has 9 distinct points"),
    "cloud of a batch": (Batch.from_data_list([cloud(50), cloud(9)]), ValueError, "cloud 1 has 9"),
    "missing cloud": (broken(batch=torch.arange(50) // 25 * 2), ValueError, "cloud 1 has 0 distinct"),
    "order": (broken(batch=torch.arange(50) % 2), ValueError, "batch must be ascending"),
    "short": (broken(batch=torch.zeros(9).long()), ValueError, r"batch must have shape \(50,\)"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_cannot_be_purified(name: str) -> None:
    data, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        purify(data, "sor")


class Mean(nn.Module):
    """A network of PyTorch Geometric that sees where the clouds are."""

    def forward(self, data: Data) -> Tensor:
        from torch_geometric.nn import global_mean_pool

        return global_mean_pool(data.pos**3, data.batch)


def test_a_network_of_batches_is_defended() -> None:
    batch = Batch.from_data_list(clouds())
    purifier = ifdefense.load("srs")
    logits = Defended(Mean(), purifier, num_points=50, seed=4, normalise=True)(batch)
    expected = [to_unit_sphere(purifier(data.pos, 50, 4)) for data in clouds()]
    torch.testing.assert_close(logits, torch.stack([(points**3).mean(0) for points in expected]))


# The transform


def test_the_transform() -> None:
    transform = Purify("sor", num_points=70, seed=5)
    assert isinstance(transform, BaseTransform)
    data = cloud(100)
    assert_same(transform(data), purify(data, "sor", 70, 5))
    assert data.num_nodes == 100
    assert str(transform) == "Purify('sor', num_points=70, seed=5)"
    assert str(Purify()) == "Purify('local-mesh', num_points=None, seed=0)"
    purifier = ifdefense.load("sor")
    assert str(Purify(purifier)) == f"Purify('sor-{digest(purifier.spec())}', num_points=None, seed=0)"
    for each in (transform, Purify(purifier, 70, 5)):
        assert_same(pickle.loads(pickle.dumps(each))(data), transform(data))
    fresh = Purify("srs", seed=None)
    assert not torch.equal(fresh(data).pos, fresh(data).pos)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"method": "onet"}, ValueError, "unknown method 'onet'; there are local-mesh"),
        ({"method": None}, TypeError, "method must be a name, a path or a purifier, got NoneType"),
        ({"num_points": 0}, ValueError, "num_points must be at least 1"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"device": "nowhere"}, ValueError, "device 'nowhere' cannot be used"),
    ],
)
def test_arguments_of_the_transform(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Purify(**given)


CLASSES = ("bathtub", "bed", "chair", "desk", "dresser", "monitor", "night_stand", "sofa", "table", "toilet")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The raw files of ModelNet10 as they are unpacked, two small boxes a class."""
    import trimesh

    root = tmp_path_factory.mktemp("modelnet")
    for place, name in enumerate(CLASSES):
        for split in ("train", "test"):
            folder = root / "raw" / name / split
            folder.mkdir(parents=True)
            for i in range(2):
                box = trimesh.creation.box((1 + place, 2, 1 + i)).subdivide()
                (folder / f"{name}_{i:04d}.off").write_text(trimesh.exchange.off.export_off(box))
    return root


def test_data_sets_take_it_before_and_behind(root: Path, tmp_path: Path) -> None:
    (tmp_path / "raw").symlink_to(root / "raw")
    sampled = T.Compose([T.SamplePoints(128), Purify("sor", 100)])
    stored = ModelNet(str(tmp_path), pre_transform=sampled, transform=Purify("srs", 32))
    assert len(stored) == 20 and stored._data.pos.shape == (2000, 3)
    assert stored[3].pos.shape == (32, 3) and stored[3].y.tolist() == [1]
    with pytest.warns(UserWarning, match="pre_transform"):
        ModelNet(str(tmp_path), pre_transform=T.Compose([T.SamplePoints(128), Purify("sor", 99)]))
    loader = DataLoader(stored, batch_size=5, num_workers=1)
    batches = list(loader)
    assert [batch.pos.shape for batch in batches] == [(160, 3)] * 4
    assert torch.equal(batches[0].pos[:32], stored[0].pos)


def test_a_mesh_has_no_points_yet(root: Path, tmp_path: Path) -> None:
    (tmp_path / "raw").symlink_to(root / "raw")
    with pytest.raises(ValueError, match=r"has face.*sample its surface first"):
        ModelNet(str(tmp_path), pre_transform=Purify("sor"))


def test_the_examples_of_the_document_run(root: Path, tmp_path: Path) -> None:
    (tmp_path / "raw").symlink_to(root / "raw")
    text = (ROOT / "docs" / "pyg.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 3
    # Small clouds and a fast method: the test is about the calls.
    points = torch.stack([cloud(64, seed).pos for seed in range(2)])
    space: dict[str, Any] = {"root": str(tmp_path), "__name__": __name__, "points": points}
    for block in blocks:
        exec(compile(block.replace("onet-mesh", "sor").replace("1024", "64"), "pyg.md", "exec"), space)
    assert len(space["dataset"]) == 20
    assert space["logits"].shape == (4, 10) and torch.isfinite(space["logits"]).all()
    assert space["clean"].pos.shape == (4 * 64, 3) and space["clean"].num_graphs == 4
    assert 0 <= space["correct"] <= 20
    assert space["attacked"].points.shape == points.shape and space["predicted"].shape == (2,)


def test_without_the_library_the_import_says_what_to_install() -> None:
    code = (
        "import sys\n"
        "sys.modules['torch_geometric'] = None\n"
        "import numpy as np, ifdefense\n"
        "ifdefense.purify(np.random.default_rng(0).normal(size=(50, 3)), 'sor')\n"
        "try:\n"
        "    import ifdefense.transforms\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "ifdefense.transforms needs PyTorch Geometric: pip install torch-geometric" in done.stdout
