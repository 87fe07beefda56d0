"""Inputs and variants of the ablation."""

from __future__ import annotations

import json
from types import SimpleNamespace

import torch
from torch import Tensor, nn

import ifdefense
from benchmarks.studies.ablation import VARIANTS, inputs
from ifdefense.purifiers.base import Purifier
from ifdefense.purifiers.compose import Compose
from ifdefense.purifiers.specs import describe
from ifdefense.purifiers.surface import SurfacePurifier
from ifdefense.restorers.mesh import MeshRestorer


def test_inputs_are_attacked_or_have_clusters() -> None:
    clean = nn.functional.normalize(
        torch.randn(4, 500, 3, generator=torch.Generator().manual_seed(0)), dim=-1
    )

    def attacked(victim: str, name: str) -> Tensor:
        return {"pgd": clean + 0.1, "drop-200": clean[:, 200:]}[name]

    bench = SimpleNamespace(points=clean, seed=0, attacked=attacked)
    given = inputs(bench)  # type: ignore[arg-type]
    assert list(given) == ["clean", "PGD", "Drop-200", "clusters"]
    assert given["clean"] is clean and given["Drop-200"].shape == (4, 300, 3)
    for cloud, spoilt in zip(clean, given["clusters"], strict=True):
        near = torch.cdist(spoilt, cloud).amin(1) < 1e-5
        assert 350 <= near.sum() < 500  # a fifth as many points as the cloud has, at most, and some
    assert torch.equal(given["clusters"], inputs(bench)["clusters"])  # type: ignore[arg-type]


def surface(purifier: Purifier) -> SurfacePurifier:
    assert isinstance(purifier, Compose)
    found = purifier.parts[-1]
    assert isinstance(found, SurfacePurifier)
    return found


def test_variants_differ_from_a_shipped_method_in_their_stages() -> None:
    for name in ("local-mesh", "onet-fill"):
        shipped, first = surface(ifdefense.load(name)), surface(VARIANTS[name]())
        assert describe(first.restorer) == describe(shipped.restorer)
    mesh = surface(VARIANTS["onet-fill, samples of the mesh alone"]())
    assert mesh.restorer == surface(ifdefense.load("onet-mesh")).restorer == MeshRestorer()
    one_view = surface(VARIANTS["onet-fill, one view of the cloud"]())
    assert (first.network.views, one_view.network.views) == (shipped.network.views, 1)  # type: ignore[attr-defined]
    assert len({json.dumps(build().spec()) for build in VARIANTS.values()}) == len(VARIANTS)
