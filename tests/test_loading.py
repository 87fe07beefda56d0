"""`ifdefense.load`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ifdefense
from ifdefense.checkpoints import save_safetensors
from ifdefense.implicit.base import Calibration
from ifdefense.implicit.occupancy import OccupancyConfig, OccupancyNetwork
from ifdefense.purifiers.registry import DEFAULT, METHODS


@pytest.mark.parametrize("name", METHODS)
def test_methods_have_their_names(name: str) -> None:
    assert ifdefense.load(name).name == name


def test_without_a_name_it_is_the_default_method() -> None:
    assert ifdefense.load().name == DEFAULT


def test_a_file_of_weights_is_loaded_into_onet_mesh(tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    network = OccupancyNetwork(OccupancyConfig(4, 4, 4))
    save_safetensors(network, path, {"network": "occupancy", **Calibration().metadata()})
    for given in (path, str(path)):
        purifier = ifdefense.load(given)
        assert purifier.name == "onet-mesh"
        assert str(path) in str(purifier.spec())
    assert ifdefense.load(path, device="cpu").spec() == purifier.spec()


def test_weights_are_put_on_the_device(device: torch.device) -> None:
    for name in ("onet-mesh", "sor-ae"):
        weights = list(ifdefense.load(name, device=device).parameters())
        assert weights and all(weight.device == device for weight in weights)
        assert not any(weight.requires_grad for weight in weights)


@pytest.mark.parametrize(
    ("device", "kind", "message"),
    [
        ("nowhere", ValueError, "device 'nowhere' cannot be used"),
        ("meta", ValueError, "device 'meta' cannot be used"),
        (3.5, TypeError, "device must be a name"),
    ],
)
def test_devices_that_are_none(device: object, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        ifdefense.load("sor", device=device)  # type: ignore[arg-type]


def test_the_settings_of_the_caller_neither_change_it_nor_are_changed() -> None:
    expected = ifdefense.load("onet-mesh").spec()
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode():
            purifier = ifdefense.load("onet-mesh")
    finally:
        torch.set_default_dtype(torch.float32)
    assert purifier.spec() == expected
    assert not any(weight.is_inference() for weight in purifier.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_former_name_warns() -> None:
    with pytest.warns(
        DeprecationWarning, match=r"from_pretrained will be removed.*call ifdefense\.load"
    ) as seen:
        purifier = ifdefense.Purifier.from_pretrained("sor")  # type: ignore[attr-defined]
    assert purifier.spec() == ifdefense.load("sor").spec()
    assert seen[0].filename == __file__
    # The module that sets it is imported with the class, whatever else a program imports.
    assert ifdefense._HOMES["Purifier"] == ifdefense._HOMES["load"]
