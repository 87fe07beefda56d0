"""The inputs of the ablation are what their names say."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from benchmarks.ablation import SHIPPED, VARIANTS, inputs
from ifdefense import SurfaceOptions


def test_inputs_are_attacked_or_have_clusters() -> None:
    clean = nn.functional.normalize(
        torch.randn(4, 500, 3, generator=torch.Generator().manual_seed(0)), dim=-1
    )

    def attacked(victim: nn.Module, name: str) -> dict[str, Tensor]:
        return {"points": {"none": clean, "pgd": clean + 0.1, "drop-200": clean[:, 200:]}[name]}

    bench = SimpleNamespace(points=clean, settings=SimpleNamespace(seed=0), attacked=attacked)
    given = inputs(bench, nn.Identity())  # type: ignore[arg-type]
    assert list(given) == ["clean", "PGD", "Drop-200", "clusters"]
    assert given["clean"] is clean and given["Drop-200"].shape == (4, 300, 3)
    for cloud, spoilt in zip(clean, given["clusters"], strict=True):
        near = torch.cdist(spoilt, cloud).amin(1) < 1e-5
        assert 350 <= near.sum() < 500  # a fifth as many points as the cloud has, at most, and some
    assert torch.equal(given["clusters"], inputs(bench, nn.Identity())["clusters"])  # type: ignore[arg-type]


def test_variants_start_from_what_is_shipped() -> None:
    assert SHIPPED == SurfaceOptions() == VARIANTS["as shipped"]
    assert len({str(variant) for variant in VARIANTS.values()}) == len(VARIANTS)
    with pytest.raises(AttributeError):
        SHIPPED.views = 2  # type: ignore[misc]
