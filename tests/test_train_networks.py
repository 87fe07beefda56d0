"""Training of every network, and shared options."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner

import ifdefense
from classifiers import build, load, train
from classifiers.adversarial import attacked, attacked_through
from classifiers.augmentation import cut_mix
from classifiers.options import ClassifierOptions
from classifiers.run import ATTACK_STEPS, THROUGH, ClassifierRun
from classifiers.train import _parse_schedule
from ifdefense.purifiers.base import Outcome
from ifdefense.training.data.clouds import TrainingClouds
from ifdefense.training.runs import RunError

TINY = ClassifierOptions(schedule=((16, 3),), batch_size=8, lr=1e-3, mix=0.5, warmup=0.0)


def blobs(count: int, seed: int) -> TrainingClouds:
    """Two classes that differ in shape: flat and long clouds."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    shapes = np.where(labels[:, None] == 0, [1, 1, 0.1], [0.2, 0.2, 1])[:, None]
    return TrainingClouds.of_arrays(rng.normal(size=(count, 32, 3)) * shapes, labels)


def run(
    folder: Path,
    network: str,
    options: ClassifierOptions = TINY,
    through: tuple[ifdefense.Purifier, ifdefense.Purifier] | None = None,
) -> ClassifierRun:
    torch.manual_seed(0)
    validation = {"validation": blobs(8, 1)}
    return ClassifierRun(build(network, 2), blobs(16, 0), validation, options, folder, through=through)


def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = "pointnet2-ssg"
    whole = run(tmp_path / "whole", network)
    whole()
    save = ClassifierRun.save

    def crash(self: ClassifierRun) -> None:
        save(self)
        if self.position == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(ClassifierRun, "save", crash)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", network)()
    monkeypatch.undo()
    resumed = run(tmp_path / "parts", network)
    assert resumed.resume()
    assert resumed() == whole.best
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    load(network, tmp_path / "whole" / "best.safetensors")


def test_the_command_trains_and_exports_any_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "load_data", lambda *_: (blobs(16, 0), {"validation": blobs(8, 1)}, 2))
    arguments = [
        "--model",
        "dgcnn",
        "--run",
        str(tmp_path / "run"),
        "--schedule",
        "16x1",
        "--batch-size",
        "8",
    ]
    arguments += [
        "--mix",
        "1",
        "--label-smoothing",
        "0",
        "--jitter",
        "0",
        "--max-rotation",
        "180",
        "--warmup",
        "0",
    ]
    arguments += ["--out", str(tmp_path / "a.safetensors")]
    outcome = CliRunner().invoke(train.main, arguments)
    assert outcome.exit_code == 0, outcome.output
    assert load("dgcnn", tmp_path / "a.safetensors")(torch.randn(1, 16, 3)).shape == (1, 2)
    card = (tmp_path / "a.md").read_text()
    assert "DGCNN of" in card
    assert '"mix": 1.0' in card and '"model": "dgcnn"' in card


def test_mixed_clouds_are_made_of_two() -> None:
    points = torch.randn(6, 10, 3)
    generator = torch.Generator().manual_seed(1)
    mixed, other, part = cut_mix(points, generator)
    assert mixed.shape == points.shape
    assert 0 < part < 1
    for cloud, own, source in zip(mixed.tolist(), points.tolist(), points[other].tolist(), strict=True):
        kept = round(10 * part)
        assert all(point in own for point in cloud[:kept])
        assert all(point in source for point in cloud[kept:])
        assert len({tuple(point) for point in cloud}) >= 10 - min(kept, 10 - kept)
    parts = {cut_mix(points, generator)[2] for _ in range(100)}
    assert min(parts) < 0.2 and max(parts) > 0.8


def test_without_warm_up_the_rate_starts_at_its_largest(tmp_path: Path) -> None:
    still = run(tmp_path / "a", "pointnet", dataclasses.replace(TINY, warmup=0.0))
    rising = run(tmp_path / "b", "pointnet", dataclasses.replace(TINY, warmup=0.5))
    assert still.schedule.get_last_lr()[0] == pytest.approx(TINY.lr, rel=0.1)
    assert rising.schedule.get_last_lr()[0] < TINY.lr / 10


@pytest.mark.parametrize("network", ["dgcnn", "pointnet2-ssg"])
def test_networks_are_sized_for_the_points_of_the_epoch_and_whole_after_it(
    network: str, tmp_path: Path
) -> None:
    training = run(tmp_path, network, dataclasses.replace(TINY, schedule=((16, 1), (32, 0.5))))
    seen: list[float] = []
    level = training.model if network == "dgcnn" else training.model.sa1
    training.model.register_forward_hook(lambda *_: seen.append(level.sparsity))
    training()
    assert seen[0] == 16 / 1024
    assert 32 / 1024 in seen
    assert level.sparsity == 1


@pytest.mark.parametrize("text", ["16x0", "0x2", "16x-1", "16", "axb", "16x1x2", "16xinf", "16xnan"])
def test_schedules_without_points_or_epochs_are_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match=f"'{text}'"):
        _parse_schedule(text)


def test_schedules_are_read() -> None:
    assert _parse_schedule("256x18,512x1.5,1024x0.3") == ((256, 18), (512, 1.5), (1024, 0.3))


class Linear(torch.nn.Module):
    """The first logit is the sum of all coordinates, weighted by axis; the second is its negative."""

    weight = torch.tensor([1.0, -2.0, 0.5])

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        height = (points * self.weight).sum((1, 2))
        return torch.stack([height, -height], 1)


def test_the_attack_of_adversarial_training_ends_in_the_corner_that_is_worst_for_a_linear_model() -> None:
    model = Linear().train()
    points, labels = torch.zeros(2, 5, 3), torch.tensor([0, 1])
    found = attacked(model, points, labels, 0.1, 3, torch.Generator().manual_seed(0))
    worst = 0.1 * model.weight.sign().expand(5, 3)
    torch.testing.assert_close(found, torch.stack([-worst, worst]))
    assert model.training


class FailingInEvaluation(torch.nn.Linear):
    """Notes whether its weights need gradients in evaluation mode, then fails."""

    needed: bool

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        self.needed = self.weight.requires_grad
        assert not self.training
        raise RuntimeError("out of memory")


def test_the_attack_of_adversarial_training_needs_no_gradients_of_the_weights_and_restores_the_network() -> (
    None
):
    model = FailingInEvaluation(3, 2)
    model.bias.requires_grad_(False)
    points, generator = torch.zeros(2, 5, 3), torch.Generator().manual_seed(0)
    with pytest.raises(RuntimeError, match="out of memory"):
        attacked(model, points, torch.tensor([0, 1]), 0.1, 3, generator)
    assert not model.needed
    assert model.training and model.weight.requires_grad and not model.bias.requires_grad


class Pairs(torch.nn.Module):
    """The first logit rises with every even point and falls half as fast with every odd one."""

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        height = points[:, ::2].sum((1, 2)) - points[:, 1::2].sum((1, 2)) / 2
        return torch.stack([height, -height], 1)


def test_shifts_that_are_averaged_move_neighbours_together() -> None:
    generator = torch.Generator().manual_seed(0)
    pairs = torch.randn(1, 6, 3, generator=generator).repeat_interleave(2, 1)
    pairs[:, ::2] += 0.01
    labels = torch.tensor([0])
    alone = attacked(Pairs(), pairs, labels, 0.1, 3, generator) - pairs
    torch.testing.assert_close(alone[0, :2], torch.tensor([[-0.1], [0.1]]).expand(2, 3))
    together = attacked(Pairs(), pairs, labels, 0.1, 3, generator, neighbours=2) - pairs
    torch.testing.assert_close(together, torch.full_like(together, -0.1))


class Spy:
    """Stands in for `attacked`: notes how many clouds are attacked in how many steps and with which means."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, int]] = []

    def __call__(
        self,
        model: torch.nn.Module,
        points: torch.Tensor,
        labels: torch.Tensor,
        delta: float,
        steps: int,
        generator: torch.Generator,
        neighbours: int = 1,
    ) -> torch.Tensor:
        self.seen.append((len(points), steps, neighbours))
        return points


def test_adversarial_training_attacks_that_share_of_every_batch_and_all_validation_clouds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Spy()
    monkeypatch.setattr("classifiers.run.attacked", spy)
    best = run(tmp_path, "pointnet", dataclasses.replace(TINY, adversarial=0.75))()
    assert spy.seen == [(6, 3, 1), (6, 3, 1), (8, ATTACK_STEPS, 1)] * 3
    assert best["validation, attacked"] == best["validation"] == best["mean"]


def test_validation_clouds_are_attacked_by_the_most_averaged_shifts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Spy()
    monkeypatch.setattr("classifiers.run.attacked", spy)
    trained = run(tmp_path, "pointnet", dataclasses.replace(TINY, adversarial=0.75, coherent=64))
    trained()
    together = 64 * trained.validation["validation"].points.shape[1] // 256
    assert together > 1
    seen = [one for one in spy.seen if one[1] == ATTACK_STEPS]
    assert seen == [(8, ATTACK_STEPS, together)] * 3


def test_a_share_of_the_batches_is_attacked_by_averaged_shifts(tmp_path: Path) -> None:
    options = dataclasses.replace(TINY, adversarial=1.0, coherent=64)
    trained = run(tmp_path, "pointnet", options)
    means = [trained._neighbours(32) for _ in range(400)]
    assert 190 < means.count(1) < 280 and set(means) == set(range(1, 9))  # 64 of 256 points are 8 of 32
    always = run(tmp_path, "pointnet", dataclasses.replace(options, coherent_share=1.0))
    means = [always._neighbours(32) for _ in range(400)]
    assert 50 < means.count(1) < 110 and set(means) == set(range(1, 9))  # of 1 to 8, even in the logarithm
    alone = run(tmp_path, "pointnet", dataclasses.replace(TINY, adversarial=1.0))
    assert {alone._neighbours(32) for _ in range(20)} == {1}


class Halved(ifdefense.Purifier):
    """Keeps the first points; shrinks them."""

    name, deterministic, differentiable = "halved", True, True

    def __init__(self) -> None:
        super().__init__()
        self.counts: list[int | None] = []

    def run(self, clouds: list[torch.Tensor], counts: Sequence[int | None], seed: int) -> list[Outcome]:
        self.counts += counts
        return [Outcome(cloud[:count] / 2) for cloud, count in zip(clouds, counts, strict=True)]


def test_clouds_attacked_through_a_purifier_are_attacked_by_its_surrogate_and_purified() -> None:
    points = torch.rand(2, 16, 3, generator=torch.Generator().manual_seed(1))
    labels, generator = torch.tensor([0, 1]), torch.Generator().manual_seed(0)
    purifier, surrogate = Halved(), Halved()
    found = attacked_through(Linear(), purifier, surrogate, points, labels, 16, 0.01, 3, generator)
    assert purifier.counts == [16, 16] and surrogate.counts == [16] * 6  # three gradients
    assert not found.requires_grad
    middle = (points.amin(1, keepdim=True) + points.amax(1, keepdim=True)) / 2
    worst = 0.01 * Linear.weight.sign() * torch.tensor([-1, 1])[:, None, None]
    torch.testing.assert_close(found, (points - middle) / 2 + middle + worst)


def test_a_share_of_the_batches_and_the_validation_clouds_are_attacked_through_the_purifier(
    tmp_path: Path,
) -> None:
    options = dataclasses.replace(TINY, adversarial=0.5, attack_steps=2, through_share=1.0)
    purifier, surrogate = Halved(), Halved()
    trained = run(tmp_path / "always", "pointnet", options, (purifier, surrogate))
    best = trained()
    # Of two batches of 8 clouds per epoch half are attacked at 16 points; of validation, 8 clouds at 32.
    assert purifier.counts == ([16] * 8 + [32] * 8) * 3
    assert surrogate.counts == ([16] * 16 + [32] * 8 * ATTACK_STEPS) * 3
    assert 0 <= best[THROUGH] <= 1
    some, never = Halved(), dataclasses.replace(options, through_share=1e-9)
    run(tmp_path / "never", "pointnet", never, (some, Halved()))()
    assert some.counts == [32] * 8 * 3
    with pytest.raises(RunError, match="was"):
        run(tmp_path / "always", "pointnet", options, (ifdefense.load("sor"), surrogate)).resume()
    for other in (dataclasses.replace(options, through_share=0.0), options):
        with pytest.raises(ValueError, match="belong together"):
            run(tmp_path, "pointnet", other, None if other is options else (purifier, surrogate))


def test_the_purifier_and_its_share_are_given_together(tmp_path: Path) -> None:
    arguments = ["--through", "sor", "--through-share", "0.5", "--run", str(tmp_path / "run")]
    result = CliRunner().invoke(train.main, arguments)
    assert result.exit_code != 0 and "through_share needs adversarial" in result.output
    for arguments in (["--through", "sor"], ["--through-share", "0.5"]):
        result = CliRunner().invoke(train.main, [*arguments, "--run", str(tmp_path / "run")])
        assert result.exit_code == 2 and "belong together" in result.output


def test_the_precision_of_products_holds_in_training_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_float32_matmul_precision()
    seen = []

    def recorded(model: torch.nn.Module, points: torch.Tensor, *rest: object) -> torch.Tensor:
        seen.append((points.shape[1], torch.get_float32_matmul_precision()))
        return points

    monkeypatch.setattr("classifiers.run.attacked", recorded)
    run(tmp_path, "pointnet", dataclasses.replace(TINY, adversarial=1.0, matmul_precision="medium"))()
    assert set(seen) == {(16, "medium"), (32, before)}  # batches of 16 points, validation clouds of 32
    assert torch.get_float32_matmul_precision() == before
    with pytest.raises(ValueError, match="matmul_precision must be one of highest, high, medium, got 'low'"):
        dataclasses.replace(TINY, matmul_precision="low")


def test_the_moving_average_is_validated_kept_and_resumed(tmp_path: Path) -> None:
    options = dataclasses.replace(TINY, average=0.5)
    whole = run(tmp_path / "whole", "pointnet", options)
    whole()
    averaged, last = whole.evaluated.state_dict(), whole.model.state_dict()
    assert any(not torch.equal(averaged[name], last[name]) for name in last)
    parts = run(tmp_path / "parts", "pointnet", options)
    parts(stop_after=1)
    resumed = run(tmp_path / "parts", "pointnet", options)
    assert resumed.resume()
    resumed()
    for name, value in averaged.items():
        assert torch.equal(value, resumed.evaluated.state_dict()[name]), name
    kept = load("pointnet", tmp_path / "parts" / "best.safetensors").state_dict()
    assert resumed.best["epoch"] == 3
    for name, value in averaged.items():  # kept as fp16
        torch.testing.assert_close(kept[name].float(), value.float(), rtol=2e-3, atol=1e-3)


def test_training_clouds_are_copies_also_of_read_only_arrays() -> None:
    points, labels = np.eye(3, dtype=np.float32)[None], np.array([1])
    for array in (points, labels):
        array.flags.writeable = False
    clouds = TrainingClouds.of_arrays(points, labels)
    clouds.points.zero_()
    clouds.labels.zero_()
    assert points.sum() == 3 and labels[0] == 1
