"""Purifiers as pickles, in copies, and in the worker processes of a loader."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from quick import CLOUDS, quick
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ifdefense import Compose, Defended, Purifier
from ifdefense.purifiers.pretrained import local_mesh
from ifdefense.purifiers.registry import METHODS
from ifdefense.purifiers.surface import SurfacePurifier
from ifdefense.stages.anomaly import AnomalyRepair


class Purified(Dataset[Tensor]):
    """Purifies its clouds when they are asked for."""

    def __init__(self, purifier: Purifier) -> None:
        self.purifier = purifier

    def __len__(self) -> int:
        return len(CLOUDS)

    def __getitem__(self, index: int) -> Tensor:
        result: Tensor = self.purifier(CLOUDS[index], 24)
        return result


@pytest.fixture(scope="module")
def purifier() -> Purifier:
    return quick("local-mesh")


@pytest.mark.parametrize("start", ["fork", "spawn", "forkserver"])
def test_works_in_the_workers_of_a_loader(purifier: Purifier, start: str) -> None:
    loader = DataLoader(Purified(purifier), batch_size=2, num_workers=1, multiprocessing_context=start)
    (batch,) = list(loader)
    assert torch.equal(batch, purifier(CLOUDS, 24))


@pytest.mark.parametrize("method", METHODS)
def test_pickles_and_copies_are_the_same(method: str) -> None:
    purifier = quick(method)
    expected = purifier(CLOUDS, 24)
    for twin in (pickle.loads(pickle.dumps(purifier)), copy.deepcopy(purifier)):
        assert torch.equal(twin(CLOUDS, 24), expected)
        assert twin.spec() == purifier.spec() and twin.name == purifier.name and not twin.training
        assert not any(weight.requires_grad for weight in twin.parameters())
        own = {weight.data_ptr() for weight in purifier.parameters()}
        assert own.isdisjoint(weight.data_ptr() for weight in twin.parameters())


def test_a_pickle_has_bytes_in_place_of_tensors(purifier: Purifier) -> None:
    class Counting(pickle.Pickler):
        tensors = 0

        def reducer_override(self, value: Any) -> Any:
            self.tensors += isinstance(value, Tensor)
            return NotImplemented

    pickler = Counting(io.BytesIO())
    pickler.dump(Defended(nn.Identity(), purifier))
    assert pickler.tensors == 0


def test_networks_that_are_shared_are_shared_afterwards(purifier: Purifier) -> None:
    for twin in (pickle.loads(pickle.dumps(purifier)), copy.deepcopy(purifier)):
        surface = twin.parts[-1]
        assert isinstance(surface, SurfacePurifier)
        repair = surface.restorer.mesh.repair  # type: ignore[attr-defined]
        assert isinstance(repair, AnomalyRepair) and repair.network.local is surface.network
        assert isinstance(twin, Compose) and twin.parts[-1] is surface


def test_a_pickle_holds_its_weights_whatever_becomes_of_their_file(tmp_path: Path) -> None:
    shipped = Path(str(local_mesh.__globals__["__file__"])).parents[1] / "weights" / "local.safetensors"
    path = tmp_path / "own.safetensors"
    path.write_bytes(shipped.read_bytes())
    purifier = local_mesh(path, repaired=False)
    expected, data = purifier(CLOUDS, 24), pickle.dumps(purifier)
    path.write_bytes(b"other weights")
    assert torch.equal(pickle.loads(data)(CLOUDS, 24), expected)


def test_a_shallow_copy_shares_the_weights(purifier: Purifier) -> None:
    twin = copy.copy(purifier)
    assert twin is not purifier and next(twin.parameters()) is next(purifier.parameters())
    assert torch.equal(twin(CLOUDS, 24), purifier(CLOUDS, 24))


def test_what_was_set_comes_along() -> None:
    purifier = quick("sor-ae").requires_grad_()
    weight = next(purifier.parameters())
    with torch.no_grad():
        weight += 1
    twin = pickle.loads(pickle.dumps(purifier))
    assert torch.equal(next(twin.parameters()), weight) and all(x.requires_grad for x in twin.parameters())
    twin.to(torch.float64)
    assert next(twin.parameters()).dtype == torch.float32
