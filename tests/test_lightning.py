"""The Lightning recipe of the documentation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from quick import CLOUDS, Pooled
from torch.utils.data import DataLoader, TensorDataset

from attacks import PGD
from ifdefense import Defended, load

pytest.importorskip("lightning", reason="Lightning is not installed: pip install lightning")


def recipe() -> str:
    text = (Path(__file__).parent.parent / "docs" / "integration.md").read_text(encoding="utf-8")
    (block,) = (each for each in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "lightning" in each)
    return block.replace("local-mesh", "sor").replace("Trainer(", 'Trainer(accelerator="cpu", ')


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec")
def test_a_defended_classifier_is_tested_on_clean_and_attacked_clouds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    classifier = Pooled().eval()
    points = torch.cat([CLOUDS, CLOUDS.flip(2)])
    with torch.no_grad():
        classifier.layer.bias -= classifier(points).mean(0)  # no favourite class
    labels = classifier(points).argmax(1)
    monkeypatch.chdir(tmp_path)
    loader = DataLoader(TensorDataset(points, labels), batch_size=2)
    space: dict[str, Any] = {"classifier": classifier, "loader": loader, "__name__": __name__}
    exec(recipe(), space)
    assert space["clean"]["plain"] == 1
    expected = [PGD("linf")(classifier, *batch).points for batch in loader]
    defended = Defended(classifier, load("sor"), seed=0)
    for name, model in (("plain", classifier), ("defended", defended)):
        hits = (model(torch.cat(expected)).argmax(1) == labels).float().mean()
        assert space["attacked"][name] == pytest.approx(float(hits)), name
    assert space["attacked"]["plain"] < 1
