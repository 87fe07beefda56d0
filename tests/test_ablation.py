"""The inputs of the ablation are what their names say."""

from __future__ import annotations

import pytest
import torch

from benchmarks.ablation import INPUTS, SHIPPED, VARIANTS, inputs
from ifdefense import SurfaceOptions
from ifdefense.points import chamfer_distance


def test_inputs_spoil_one_thing_each() -> None:
    clean = torch.nn.functional.normalize(
        torch.randn(4, 500, 3, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    given = inputs(clean, seed=0)
    assert set(given) == set(INPUTS) and all(points.shape == clean.shape for points in given.values())
    assert chamfer_distance(given["clean"], clean).max() < 1e-10
    from_clean = {name: chamfer_distance(points, clean) for name, points in given.items()}
    assert all((from_clean[name] > 1e-4).any() for name in ("holes", "noise", "clusters"))
    distinct = [len(torch.unique(cloud, dim=0)) for cloud in given["holes"]]
    assert min(distinct) < 500
    assert torch.equal(given["noise"], inputs(clean, seed=0)["noise"])


def test_variants_start_from_what_is_shipped() -> None:
    assert SHIPPED == SurfaceOptions() == VARIANTS["as shipped"]
    assert len({str(variant) for variant in VARIANTS.values()}) == len(VARIANTS)
    with pytest.raises(AttributeError):
        SHIPPED.views = 2  # type: ignore[misc]
