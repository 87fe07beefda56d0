"""The caller's settings of PyTorch neither change a purifier nor are changed by it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quick import CLOUDS, Pooled, load_quick, quick
from torch import Tensor, nn

from attacks.defence_aware.model import DefenceAware
from ifdefense import Defended, Purifier, guard, load, purify
from ifdefense.guard import guarded, isolated
from ifdefense.implicit.base import load_network
from ifdefense.purifiers.registry import METHODS

POINTS = 24


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def products(precision: str) -> Iterator[None]:
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


@contextlib.contextmanager
def backends(precision: str) -> Iterator[None]:
    """As `products`, in PyTorch's newer way, which also reaches convolutions."""
    torch.backends.fp32_precision = precision  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.backends.fp32_precision = "none"  # type: ignore[attr-defined]


@contextlib.contextmanager
def everything() -> Iterator[None]:
    with default_dtype(torch.float64), default_device("meta"), products("medium"), torch.inference_mode():  # noqa: SIM117
        with torch.autocast("cpu", dtype=torch.bfloat16):
            yield


STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference mode": torch.inference_mode,
    "float64": lambda: default_dtype(torch.float64),
    "default device": lambda: default_device("meta"),
    "medium precision": lambda: products("medium"),
    "everything": everything,
}


def settings() -> dict[str, Any]:
    """All settings that a call might leave changed."""
    return {
        "autocast": torch.is_autocast_enabled("cpu"),
        "inference": torch.is_inference_mode_enabled(),
        "gradients": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "precision": torch.get_float32_matmul_precision(),
        "products": torch.backends.mkldnn.matmul.fp32_precision,
        "convolutions": torch.backends.mkldnn.conv.fp32_precision,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "seed": torch.get_rng_state().tolist(),
    }


@pytest.fixture(scope="module")
def methods() -> dict[str, tuple[Purifier, Tensor]]:
    """Every method, and what it makes of the clouds."""
    loaded = {name: quick(name) for name in METHODS}
    for purifier in loaded.values():
        assert all(trace.fallback is None for trace in purifier.trace(CLOUDS, POINTS, seed=1))
    return {name: (purifier, purifier(CLOUDS, POINTS, seed=1)) for name, purifier in loaded.items()}


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("method", METHODS)
def test_no_setting_reaches_a_method(
    methods: dict[str, tuple[Purifier, Tensor]], method: str, state: str, threads: int
) -> None:
    purifier, expected = methods[method]
    with STATES[state]():
        before = settings()
        result = purifier(CLOUDS, POINTS, seed=1)
        assert settings() == before
    assert result.device.type == "cpu" and result.dtype == torch.float32 and torch.equal(result, expected)


@pytest.mark.parametrize("state", ["inference mode", "float64", "default device", "everything"])
@pytest.mark.parametrize("method", ["local-mesh", "sor-ae"])
def test_no_setting_reaches_the_loading(
    methods: dict[str, tuple[Purifier, Tensor]], method: str, state: str
) -> None:
    purifier, _ = methods[method]
    with STATES[state]():
        before = settings()
        loaded = load_quick(method)
        assert settings() == before  # new layers would draw from the caller's generator
    assert {weight.dtype for weight in loaded.parameters()} == {torch.float32}
    assert loaded.spec() == purifier.spec()
    points = CLOUDS.clone().requires_grad_()  # a weight made in inference mode would be no part of a graph
    assert torch.equal(loaded(points, POINTS, seed=1).detach(), purifier(points, POINTS, seed=1).detach())


@pytest.mark.parametrize("state", ["autocast", "default device", "everything"])
def test_no_setting_reaches_a_method_on_other_ways(
    methods: dict[str, tuple[Purifier, Tensor]], state: str
) -> None:
    purifier, expected = methods["local-mesh"]
    seen: list[Tensor] = []

    def classifier(points: Tensor) -> Tensor:
        seen.append(points)
        return torch.zeros(len(points), 5, device="cpu")

    defended = Defended(classifier, purifier, num_points=POINTS, normalise=False, seed=1)  # type: ignore[arg-type]
    aware = DefenceAware(classifier, purifier, num_points=POINTS, normalise=False, seed=1)
    array, listed = CLOUDS.numpy(), CLOUDS.tolist()
    with STATES[state]():
        purified = purify(array, purifier, POINTS, 1)
        traces = purifier.trace(array, POINTS, 1)
        numbers = purify(listed, purifier, POINTS, 1)
        defended(CLOUDS)
        aware(CLOUDS)
    np.testing.assert_array_equal(purified, expected)
    np.testing.assert_array_equal(np.stack([trace.purified for trace in traces]), expected)
    np.testing.assert_allclose(numbers, expected, atol=1e-6)
    assert torch.equal(seen[0], expected) and torch.equal(seen[1], expected)


def test_no_setting_reaches_the_data_of_pyg(methods: dict[str, tuple[Purifier, Tensor]]) -> None:
    geometric = pytest.importorskip("torch_geometric.data")
    from ifdefense.transforms import Purify

    purifier, expected = methods["local-mesh"]
    data = geometric.Batch.from_data_list([geometric.Data(pos=cloud) for cloud in CLOUDS])
    with everything():
        results = [purifier(data, POINTS, seed=1), Purify(purifier, POINTS, seed=1)(data)]
    for result in results:
        assert torch.equal(result.pos, expected.flatten(0, 1))
        assert result.batch.tolist() == [0] * POINTS + [1] * POINTS


def test_tensors_of_inference_mode_pass_gradients_on_afterwards() -> None:
    purifier = quick("local-mesh")
    with torch.inference_mode():
        clouds = CLOUDS.clone()
        result = purifier(clouds, POINTS, seed=1)
        purifier._apply(torch.clone)  # as when it is moved to another device
    assert clouds.is_inference() and not result.is_inference()
    assert not any(weight.is_inference() for weight in purifier.parameters())
    assert torch.equal(purifier(clouds, POINTS, seed=1), result)
    result.requires_grad_().square().sum().backward()


class Failing(Purifier):
    """Fails where it would be asked for a result."""

    name = "failing"

    def run(self, clouds: Any, counts: Any, seed: int) -> Any:
        assert not torch.is_inference_mode_enabled() and not torch.is_autocast_enabled("cpu")
        assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        assert torch.zeros(1).device.type == "cpu"
        raise RuntimeError("there is no result")


@pytest.mark.parametrize("call", [Failing(), Failing().trace, lambda clouds: purify(clouds, Failing())])
def test_the_settings_come_back_after_an_error(call: Callable[[Tensor], object]) -> None:
    with everything():
        before = settings()
        with pytest.raises(RuntimeError, match="there is no result"):
            call(CLOUDS)
        assert settings() == before


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="this PyTorch has one precision")
def test_an_inherited_precision_is_inherited_afterwards() -> None:
    convolution = torch.backends.mkldnn.conv
    with backends("bf16"):
        with isolated():
            assert convolution.fp32_precision == "ieee"
        assert convolution.fp32_precision == "bf16"
        torch.backends.fp32_precision = "ieee"  # type: ignore[attr-defined]
        assert convolution.fp32_precision == "ieee"


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="this PyTorch has one precision")
def test_convolutions_of_a_gpu_are_exact_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    convolution = torch.backends.cudnn.conv
    assert convolution.fp32_precision == "tf32"  # PyTorch's default
    with isolated():
        assert convolution.fp32_precision == "tf32"  # nothing is asked of a GPU that is not in use
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with products("high"), isolated():
        assert convolution.fp32_precision == torch.backends.cuda.matmul.fp32_precision == "ieee"
    assert convolution.fp32_precision == "tf32"


def test_older_versions_have_one_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_precisions", lambda: [guard._MatmulPrecision()])
    with products("medium"):
        with isolated():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"


def test_the_precision_comes_back_with_the_last_of_several_threads() -> None:
    inside, leave = threading.Barrier(3), threading.Event()

    def enter(_: int) -> str:
        with isolated():
            inside.wait(10)
            leave.wait(10)
            return str(torch.backends.mkldnn.matmul.fp32_precision)

    with products("medium"), ThreadPoolExecutor(2) as pool:
        seen = pool.map(enter, range(2))
        inside.wait(10)
        with isolated():
            pass
        assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"  # two are inside still
        leave.set()
        assert list(seen) == ["ieee", "ieee"]
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
        assert torch.get_float32_matmul_precision() == "medium"


def test_gradients_are_the_caller_s_choice(methods: dict[str, tuple[Purifier, Tensor]]) -> None:
    purifier, _ = methods["local-mesh"]
    points = CLOUDS.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert purifier(points, POINTS).requires_grad
    with torch.no_grad():
        assert not purifier(points, POINTS).requires_grad
    with torch.inference_mode():
        assert not purifier(points, POINTS).requires_grad
    assert not purifier(CLOUDS, POINTS).requires_grad


def test_a_compiled_model_has_its_purifier_as_it_is(methods: dict[str, tuple[Purifier, Tensor]]) -> None:
    purifier, expected = methods["local-mesh"]
    defended = Defended(Pooled(), purifier, num_points=POINTS, seed=1)
    with torch.no_grad():
        logits = defended(CLOUDS)
        compiled = torch.compile(defended, backend="eager")
        assert torch.equal(compiled(CLOUDS), logits) and torch.equal(compiled(CLOUDS), logits)
    calls = torch.compile(lambda points: purify(points, purifier, POINTS, 1) + 1, backend="eager")
    assert torch.equal(calls(CLOUDS), expected + 1)


@pytest.mark.parametrize("record", [torch.export.export, torch.jit.trace])
def test_purifiers_are_not_exported(record: Callable[..., Any]) -> None:
    """A graph would hold the neighbours of the cloud that it was recorded with."""
    defended = Defended(Pooled(), load("sor"), seed=1).eval()
    with torch.no_grad(), pytest.raises(RuntimeError, match="purifiers cannot be exported or traced"):
        record(defended, (CLOUDS,))
    assert defended(CLOUDS).shape == (len(CLOUDS), 5)


def test_the_compiler_is_not_loaded_without_need() -> None:
    code = """
import sys, torch, ifdefense
ifdefense.purify(torch.rand(50, 3), "sor")
print("torch._dynamo" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_loaded_networks_are_frozen(methods: dict[str, tuple[Purifier, Tensor]]) -> None:
    networks = [load_network(name) for name in ("generative", "image", "voxel")]
    for network in [*networks, *(purifier for purifier, _ in methods.values())]:
        assert isinstance(network, nn.Module) and not network.training
        assert not any(weight.requires_grad for weight in network.parameters())


def test_training_a_defended_model_leaves_its_purifier_alone() -> None:
    purifier, classifier = quick("local-mesh"), Pooled()
    model = Defended(classifier, purifier, num_points=POINTS, seed=1).train()
    assert classifier.training and not any(module.training for module in purifier.modules())
    before = {name: value.clone() for name, value in purifier.state_dict().items()}
    start = classifier.layer.weight.detach().clone()
    points = CLOUDS.clone().requires_grad_()
    optimiser = torch.optim.Adam(model.parameters(), 0.1, weight_decay=0.1)
    model(points).square().sum().backward()
    optimiser.step()
    assert all(torch.equal(value, before[name]) for name, value in purifier.state_dict().items())
    assert not torch.equal(classifier.layer.weight, start)
    assert points.grad is not None and points.grad.any()


def test_an_explicit_wish_makes_a_purifier_trainable() -> None:
    purifier = quick("local-mesh").requires_grad_()
    purifier(CLOUDS, POINTS).square().sum().backward()
    assert sum(weight.grad is not None and bool(weight.grad.any()) for weight in purifier.parameters()) > 100


DDP = """
import sys

import torch
from quick import CLOUDS, Pooled, quick
from torch import nn

from ifdefense import Defended


def losses(model, points):
    parallel = nn.parallel.DistributedDataParallel(model).train()
    optimiser = torch.optim.SGD(parallel.parameters(), 0.1)
    for _ in range(2):
        optimiser.zero_grad()
        loss = parallel(points).square().sum()
        loss.backward()
        optimiser.step()
        yield loss.item()


torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
first, second = losses(nn.Linear(3, 1), CLOUDS[0, :4])
print("DDP works", flush=True)
first, second = losses(Defended(Pooled(), quick("local-mesh"), num_points=24, seed=1), CLOUDS)
print("learns" if second < first else "does not learn")
"""


def test_a_defended_model_in_ddp() -> None:
    """In a process of its own: where sockets are forbidden, Gloo may wait for hours and hears no signal."""
    environment = os.environ | {
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]),
    }
    command = [sys.executable, "-c", DDP]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        out, error = done.stdout, done.stderr
    except subprocess.TimeoutExpired as expired:
        out, error = (expired.stdout or b"").decode(), "no answer after 120 s"
    if "DDP works" not in out:
        pytest.skip(f"DDP of one linear layer does not work here: {error[-300:]}")
    assert "learns" in out.splitlines(), error


def test_a_guarded_function_keeps_its_name_and_arguments() -> None:
    @guarded
    def double(value: int, *, times: int = 2) -> int:
        """Doubles."""
        return times * value

    assert double(3) == 6 and double(3, times=3) == 9
    assert double.__name__ == "double" and double.__doc__ == "Doubles."
