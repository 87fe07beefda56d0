"""A stand-in for an accelerator, so that a machine without one can test code for one.

The device ``fake:0`` refuses what CUDA refuses and counts what would be launches, waits and copies on a GPU::

    def test_something(device):                    # the fixture of `conftest` registers the stand-in
        points = torch.randn(4, 1024, 3).to(device)
        with fake_device.watch() as seen:
            ifdefense.purify(points)
        print(seen.table())

A wrapper subclass holds the values on the host. PyTorch's backend for devices written in Python
(``PrivateUse1``) gives the device its name and its factories, so no mode is needed: threads, autograd,
optimisers and copies work.

It catches tensors of two devices in one operation, `numpy` and DLPack of device tensors, generators of the
CPU that draw on the device, factories without ``device=``, weights left behind, and, by `without_float64`,
float64 on a device that lacks it. It does not catch operations and dtypes that CUDA lacks, its rounding, its
atomic additions, memory, streams and races; branches on ``is_cuda`` are not taken. There is no
``torch.Generator("fake")``, no inference mode, and no change of a shape in place.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

NAME = "fake"
available = False
"""What PyTorch is told when it looks for an accelerator by itself, as `torch.nn.DataParallel` does."""

KINDS = ("launch", "wait", "to host", "to device")
PACKAGES = {"ifdefense", "attacks", "classifiers", "benchmarks"}

_COPIES = {"_to_copy", "copy_", "_copy_from"}
_INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
_MIXED = {"where", "masked_fill", "masked_fill_", "fill_", "lerp", "clamp"} | _COPIES
"""Operations that are not pointwise by tag and yet take numbers of the CPU beside device tensors."""
_WAITS = {
    *("_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "unique_consecutive"),
    *("masked_select", "equal", "bincount", "repeat_interleave"),
}
"""Operations whose result's size or value the host has to know."""
_VIEWS = {
    *("view", "_unsafe_view", "expand", "permute", "transpose", "t", "select", "slice", "unsqueeze"),
    *("squeeze", "detach", "alias", "as_strided", "unbind", "split", "split_with_sizes", "_reshape_alias"),
    *("unfold", "diagonal", "lift_fresh", "empty", "empty_strided", "empty_like", "new_empty"),
    *("new_empty_strided",),
}
"""Operations that launch nothing."""
_RANDOM = {
    *("median.dim", "median.dim_values", "nanmedian.dim", "kthvalue", "kthvalue.values", "histc", "put_"),
    *("grid_sampler_2d_backward", "grid_sampler_3d_backward", "adaptive_max_pool2d_backward"),
    *("_adaptive_avg_pool2d_backward", "upsample_bilinear2d_backward", "upsample_linear1d_backward"),
}
"""Operations that CUDA refuses where deterministic algorithms are asked for."""


class Watch(collections.Counter[tuple[str, str, str]]):
    """Counts by kind (see `KINDS`), line of the project, and operation."""

    def count(self, kind: str) -> int:
        """Number of all events of a kind."""
        return sum(number for key, number in self.items() if key[0] == kind)

    def lines(self, kind: str) -> collections.Counter[str]:
        """Number of events of a kind by line, such as ``ifdefense.geometry.points:91``."""
        rows: collections.Counter[str] = collections.Counter()
        for (of, where, _), number in self.items():
            if of == kind:
                rows[where] += number
        return rows

    def table(self, most: int = 12) -> str:
        """The counts as text, the busiest lines first."""
        rows = []
        for kind in KINDS:
            rows.append(f"{kind}: {self.count(kind)}")
            rows += [f"{number:9d} {where}" for where, number in self.lines(kind).most_common(most)]
        return "\n".join(rows)


_watches: list[Watch] = []
_lacks_float64 = False
_state: Tensor | None = None
"""State of the device's own generator of random numbers; before it is seeded, a fixed one."""


@contextlib.contextmanager
def watch() -> Iterator[Watch]:
    """Counts what the code inside does on the device, in all threads."""
    seen = Watch()
    _watches.append(seen)
    try:
        yield seen
    finally:
        _watches.pop(next(i for i, other in enumerate(_watches) if other is seen))


@contextlib.contextmanager
def without_float64() -> Iterator[None]:
    """Makes the device refuse float64, as MPS does."""
    global _lacks_float64
    _lacks_float64 = True
    try:
        yield
    finally:
        _lacks_float64 = False


def _see(kind: str, operation: str) -> None:
    if not _watches:
        return
    frame = sys._getframe(1)
    where = "(caller or backward)"
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if module.partition(".")[0] in PACKAGES:
            where = f"{module}:{frame.f_lineno}"
            break
        frame = frame.f_back  # type: ignore[assignment]
    for seen in _watches:
        seen[kind, where, operation] += 1


def _refused(method: str) -> Callable[..., NoReturn]:
    def refuse(self: Tensor, *args: object, **options: object) -> NoReturn:
        raise TypeError(
            f"{method}: can't convert {NAME}:0 device type tensor to numpy. "
            "Use Tensor.cpu() to copy the tensor to host memory first."
        )

    return refuse


class DeviceTensor(Tensor):
    """A tensor of the device. Only kernels look at ``host``, which holds its values."""

    host: Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls: type[DeviceTensor], host: Tensor) -> DeviceTensor:
        assert type(host) is Tensor and host.device.type == "cpu", (type(host), host.device)
        if _lacks_float64 and host.dtype in (torch.float64, torch.complex128):
            raise TypeError(
                f"Cannot convert a {NAME} Tensor to float64 dtype as the framework doesn't support float64"
            )
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=torch.device(NAME, 0),
        )
        self.host = host
        return self

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return _run(func, *args, **(kwargs or {}))

    numpy = _refused("numpy")
    __array__ = _refused("__array__")
    __dlpack__ = _refused("__dlpack__")

    def data_ptr(self) -> int:
        """The address of the values, which tells aliases apart as on CUDA."""
        return self.host.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, **options: object) -> str:
        return f"{self.host!r} on {NAME}:0"

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.ndim == 0 else repr(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if not self.is_leaf:
            raise RuntimeError("only leaves can be copied deeply")
        copied = DeviceTensor(self.host.clone()).requires_grad_(self.requires_grad)
        if getattr(self, "_is_param", False):
            copied._is_param = True  # type: ignore[attr-defined]
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles the values, which come back on the CPU, as with ``map_location="cpu"``."""
        return self.detach().host.clone().__reduce_ex__(protocol)


def _on_device(value: object) -> bool:
    return isinstance(value, DeviceTensor)


def _check(func: Any, name: str, args: Any, kwargs: dict[str, Any], flat: list[Any]) -> None:
    """Raises what CUDA raises."""
    if torch.are_deterministic_algorithms_enabled() and _varies(func, name, args, kwargs):
        raise RuntimeError(f"{func} does not have a deterministic implementation")
    tensors = [value for value in flat if isinstance(value, Tensor)]
    if any(isinstance(value, torch.Generator) and value.device.type != NAME for value in flat):
        raise RuntimeError(f"Expected a '{NAME}' device type for generator but found 'cpu' ({func})")
    if all(map(_on_device, tensors)) or name in _COPIES:
        return
    two = RuntimeError(
        "Expected all tensors to be on the same device, but found at least two devices, "
        f"{NAME}:0 and cpu! (in {func})"
    )
    if name in _INDEXED:
        if not _on_device(args[0]):
            raise RuntimeError("indices should be on the same device as the indexed tensor (cpu)")
        if name.endswith("index") or _on_device(args[2]) or args[2].ndim == 0:
            return
        raise two
    written = [
        kwargs.get(a.name) if a.kwarg_only else (args[i] if i < len(args) else None)
        for i, a in enumerate(func._schema.arguments)
        if a.alias_info is not None and a.alias_info.is_write
    ]
    if any(isinstance(value, Tensor) and not _on_device(value) for value in written):
        raise two
    mixed = torch.Tag.pointwise in func.tags or name in _MIXED or name.startswith("_foreach")
    if not mixed or any(value.ndim and not _on_device(value) for value in tensors):
        raise two


def _varies(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether CUDA computes in an order that varies, and has no other way to."""
    if name == "bincount":
        return (len(args) > 1 and args[1] is not None) or kwargs.get("weights") is not None
    if name in ("cumsum", "cumsum_"):
        return args[0].is_floating_point()
    return str(func).removeprefix("aten.").removesuffix(".default") in _RANDOM


def _count(name: str, args: Any, tensors: list[Tensor], target: str) -> None:
    mine = sum(map(_on_device, tensors))
    if name in _COPIES or mine < len(tensors):
        if (name == "_to_copy" and target == "cpu") or (name == "copy_" and not _on_device(args[0])):
            return _see("to host", name)
        if mine < len(tensors):
            _see("to device", name)
    masks = name in _INDEXED and any(getattr(index, "dtype", None) == torch.bool for index in args[1])
    if name in _WAITS or masks:
        _see("wait", name)
    if name not in _VIEWS:
        _see("launch", name)
    return None


@contextlib.contextmanager
def _own_generator() -> Iterator[None]:
    """Draws from the device's generator and leaves that of the CPU as it is."""
    global _state
    ours = torch.get_rng_state()
    torch.set_rng_state(_Backend.get_rng_state())
    try:
        yield
    finally:
        _state = torch.get_rng_state()
        torch.set_rng_state(ours)


def _run(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Runs an operation on the values and wraps its results."""
    name = func._schema.name.split("::")[1]
    flat, spec = pytree.tree_flatten((args, kwargs))
    tensors = [value for value in flat if isinstance(value, Tensor)]
    target = NAME if kwargs.get("device") is None else torch.device(kwargs["device"]).type
    _check(func, name, args, kwargs, flat)
    if _watches:
        _count(name, args, tensors, target)
    values, options = pytree.tree_unflatten([v.host if _on_device(v) else v for v in flat], spec)
    if options.get("device") is not None:
        options["device"] = torch.device("cpu")
    draws = torch.Tag.nondeterministic_seeded in func.tags
    with _own_generator() if draws else contextlib.nullcontext():
        out = func(*values, **options)
    if any(_on_device(tensor) and tensor.host.shape != tensor.shape for tensor in tensors):
        raise NotImplementedError(f"the fake device cannot change a shape in place ({func})")
    if target != NAME:
        return out
    results = func._schema.returns
    if len(results) == 1 and results[0].alias_info is not None and results[0].alias_info.is_write:
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                return kwargs[argument.name] if argument.kwarg_only else args[i]
    # Operations with several `out=`, and those that give back what they got, return what they were given.
    given = {id(tensor.host): tensor for tensor in tensors if _on_device(tensor)}

    def wrapped(value: Any) -> Any:
        if not isinstance(value, Tensor) or _on_device(value):
            return value
        return given[id(value)] if id(value) in given else DeviceTensor(value)

    return pytree.tree_map(wrapped, out)


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """The copy inside ``torch.tensor(..., device=)``."""
    if _on_device(source) != _on_device(target):
        _see("to device" if _on_device(target) else "to host", "copy_")
    (target.host if _on_device(target) else target).copy_(source.host if _on_device(source) else source)  # type: ignore[attr-defined]
    return target


class _Backend:
    """What PyTorch asks of the module ``torch.fake``."""

    _is_in_bad_fork = staticmethod(lambda: False)
    is_available = staticmethod(lambda: available)
    is_initialized = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    get_amp_supported_dtype = staticmethod(lambda: [torch.float16, torch.bfloat16])

    @staticmethod
    def manual_seed(seed: int) -> None:
        global _state
        # Another stream than that of the CPU for the same seed, as on CUDA.
        _state = torch.Generator().manual_seed((seed ^ 0x5EED) & (2**63 - 1)).get_state()

    manual_seed_all = manual_seed

    @staticmethod
    def get_rng_state(device: object = None) -> Tensor:
        if _state is None:
            _Backend.manual_seed(0)
        assert _state is not None
        return _state.clone()

    @staticmethod
    def set_rng_state(state: Tensor, device: object = None) -> None:
        global _state
        _state = state.clone()


_library: list[torch.library.Library] = []
"""The kernels; PyTorch forgets them with the object."""


@functools.cache
def register() -> torch.device:
    """Registers the device in this process, for good, and returns it.

    Raises:
        ImportError: If this PyTorch knows no devices written in Python.
    """
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(NAME, _Backend())
    library = torch.library.Library("aten", "IMPL")
    for schema in torch._C._jit_get_all_schemas():
        names = [argument.name for argument in schema.arguments]
        takes_tensors = any("Tensor" in str(argument.type) for argument in schema.arguments)
        if not schema.name.startswith("aten::") or "device" not in names or takes_tensors:
            continue
        name = schema.name.removeprefix("aten::")
        factory = getattr(getattr(torch.ops.aten, name, None), schema.overload_name or "default", None)
        if factory is None or "CompositeImplicitAutograd" in str(factory.py_kernels.keys()):
            continue
        full = f"{name}.{schema.overload_name}" if schema.overload_name else name
        with contextlib.suppress(RuntimeError):  # some have no kernel that could be replaced
            library.impl(full, functools.partial(_run, factory), "PrivateUse1")
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    every = torch.library.Library("_", "IMPL")
    every.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")  # autocast changes nothing here
    _library.extend([library, every])
    return torch.device(NAME, 0)


def _swap(swap: Callable[[Tensor, Tensor], None], first: Tensor, second: Tensor) -> None:
    """Gives a parameter new values; only between devices by PyTorch's swap, which wants sole references."""
    if _on_device(first) and _on_device(second) and first.dtype == second.dtype:
        first.host = second.host  # type: ignore[attr-defined]
    elif not _on_device(first) and not _on_device(second):
        first.data = second.data
    else:
        swap(first, second)


@contextlib.contextmanager
def present() -> Iterator[torch.device]:
    """The device. Meanwhile modules keep their parameters' identity when they move to it, as on CUDA.

    `torch.accelerator.synchronize` is counted as a wait.
    """
    device = register()
    swap, wait = torch.utils.swap_tensors, torch.accelerator.synchronize
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    torch.utils.swap_tensors = functools.partial(_swap, swap)
    torch.accelerator.synchronize = lambda device=None: _see("wait", "synchronize")
    try:
        yield device
    finally:
        torch.utils.swap_tensors, torch.accelerator.synchronize = swap, wait
        torch.__future__.set_swap_module_params_on_conversion(swaps)
