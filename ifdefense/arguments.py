"""Checks of user input: numbers, devices, and the points of one cloud."""

from __future__ import annotations

import secrets
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ifdefense.devices import has_float64, in_float64

MIN_POINTS = 16
"""Minimum number of distinct points in a cloud."""

MAX_SEED = 2**63 - 1
"""Largest seed that every generator accepts."""

MAX_POINTS = 100_000_000
"""Maximum number of points per result; larger numbers are probably mistakes."""


def integer(name: str, value: object, least: int, most: int | None = None) -> int:
    """Converts an argument to a Python integer and checks its range.

    Args:
        name: name of the argument, for error messages.
        value: a Python or NumPy integer.
        least: smallest allowed value.
        most: largest allowed value.

    Raises:
        TypeError: if the value is not an integer; bools and floats are not accepted.
        ValueError: if it is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer, got {_shown(value)}")
    number = int(value)
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    if most is not None and number > most:
        raise ValueError(f"{name} must be at most {most}, got {number}")
    return number


def seed_of(value: object, name: str = "seed") -> int:
    """A seed from 0 to 2^63 - 1; a fresh one, from the system's entropy, for ``None``."""
    return secrets.randbelow(MAX_SEED + 1) if value is None else integer(name, value, 0, MAX_SEED)


def count_of(value: object, name: str = "num_points") -> int | None:
    """A number of points, at least 1; ``None`` stays ``None``."""
    return None if value is None else integer(name, value, 1, MAX_POINTS)


def named_device(value: object) -> torch.device:
    """Parses a device without using it: allocating memory on an accelerator prevents forking the process.

    Raises:
        TypeError: if it is neither a name nor a device.
        ValueError: if the name is unknown, or the device holds no values.
    """
    if not isinstance(value, (str, torch.device)):
        raise TypeError(f"device must be a name such as 'cuda:0', got {_shown(value)}")
    try:
        device = torch.device(value)
    except RuntimeError as error:
        raise _unusable(value, error) from None
    if device.type == "meta":
        raise ValueError("device 'meta' cannot be used: it holds no values")
    return device


def device_of(value: object) -> torch.device:
    """Checks that a device can be used, and adds its index: ``"cuda"`` becomes the current ``"cuda:0"``.

    Raises:
        TypeError: if it is neither a name nor a device.
        ValueError: if the device is not available.
    """
    device = named_device(value)
    try:
        return torch.empty(1, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise _unusable(value, error) from None


def real_tensor(values: object, name: str) -> Tensor:
    """Converts values to a float tensor without loss, on their device.

    8- and 16-bit integers become float32, larger ones float64; floating-point numbers stay as they are, and
    those of more than 64 bits become float64. Nested lists of numbers are float64.

    Args:
        values: a tensor, a NumPy array, or nested lists of numbers.
        name: name of the values, for error messages.

    Raises:
        TypeError: if the values are not real numbers, or the tensor is not dense.
        ValueError: if values are masked, or integers exceed 2^53, the limit of float64.
    """
    if isinstance(values, (list, tuple)):
        values = _array_of_lists(values, name)
    if isinstance(values, np.ndarray):
        values = torch.from_numpy(_native(values, name))
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} is a {type(values).__name__}: expected a NumPy array or a tensor")
    if values.layout != torch.strided or values.is_nested or values.is_meta:
        raise TypeError(f"{name} is not a dense tensor that holds values")
    if values.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return values
    if values.dtype in (torch.uint8, torch.int8, torch.int16):
        return values.float()
    if values.dtype in (torch.uint16, torch.uint32, torch.int32, torch.int64):
        if not has_float64(values.device):
            kind = str(values.dtype).removeprefix("torch.")
            raise TypeError(
                f"{name} has dtype {kind}, which becomes float64, and device {str(values.device)!r} has "
                "none: give float32, or integers on the CPU"
            )
        exact = values.double()
        if values.dtype == torch.int64 and values.numel() and float(exact.abs().max()) > 2**53:
            raise ValueError(f"{name} has integers beyond 2^53: subtract an offset first")
        return exact
    raise TypeError(f"{name} has dtype {values.dtype}: coordinates must be real numbers")


def cloud_of(values: object, name: str) -> Tensor:
    """Converts one cloud to a tensor and checks it.

    Args:
        values: ``(N, 3 + C)`` coordinates and attributes, see `real_tensor`.
        name: name of the cloud, for error messages.

    Returns:
        ``(N, 3 + C)`` float tensor.

    Raises:
        TypeError: as `real_tensor`.
        ValueError: for a wrong shape, NaN or infinity among the coordinates, coordinates too large or too
            close together to compute with, or fewer than `MIN_POINTS` distinct points.
    """
    cloud = real_tensor(values, name)
    if cloud.ndim != 2 or cloud.shape[1] < 3:
        raise ValueError(f"{name} must have shape (N, 3) or (N, 3 + C), got {tuple(cloud.shape)}")
    points = cloud.detach()[:, :3].cpu()  # every check copies a value to the host
    broken = ~torch.isfinite(points).all(1)
    if broken.any():
        first = int(broken.nonzero()[0])
        raise ValueError(
            f"{name} has {int(broken.sum())} points with NaN or infinity, the first is point {first}"
        )
    if len(points) > 1 and bool((points == points[0]).all()):
        raise ValueError(f"{name} has zero extent: all its {len(points)} points are the same")
    # Duplicates are rare, so the first points usually suffice.
    distinct = len(torch.unique(points[: 2 * MIN_POINTS], dim=0))
    if distinct < MIN_POINTS < len(points):
        distinct = len(torch.unique(points, dim=0))
    if distinct < MIN_POINTS:
        hint = " (the layout is (N, 3), a row per point)" if len(cloud) == 3 < cloud.shape[1] else ""
        raise ValueError(f"{name} has {distinct} distinct points, at least {MIN_POINTS} are needed{hint}")
    wide = in_float64(points)
    extent, largest = float((wide.amax(0) - wide.amin(0)).max()), float(wide.abs().max())
    if not 1e-150 < extent < 1e150 or largest > torch.finfo(cloud.dtype).max / 2:
        raise ValueError(
            f"{name} reaches {largest:.3g} with an extent of {extent:.3g}: too large or too small to compute "
            f"with in {str(cloud.dtype).removeprefix('torch.')}"
        )
    return cloud


def _native(values: NDArray[Any], name: str) -> NDArray[Any]:
    """Converts to a plain array in native byte order, with a dtype supported by torch."""
    if isinstance(values, np.ma.MaskedArray) and np.ma.is_masked(values):
        masked = int(np.ma.getmaskarray(values).sum())
        raise ValueError(f"{name} has {masked} masked values: fill them, or leave their points out")
    if values.dtype.kind not in "fiu":
        hint = "; pass clouds of different sizes as a list" if values.dtype.kind == "O" else ""
        raise TypeError(f"{name} has dtype {values.dtype}: coordinates must be real numbers{hint}")
    plain = np.asarray(values)
    if plain.dtype.kind == "f" and plain.dtype.itemsize > 8:
        return plain.astype(np.float64)
    if plain.dtype.kind == "u" and plain.dtype.itemsize == 8:
        if plain.size and plain.max() > 2**53:
            raise ValueError(f"{name} has integers beyond 2^53: subtract an offset first")
        return plain.astype(np.int64)
    native = np.ascontiguousarray(plain, dtype=plain.dtype.newbyteorder("="))
    return native if native.flags.writeable else native.copy()


def _array_of_lists(values: list[Any] | tuple[Any, ...], name: str) -> NDArray[Any]:
    try:
        array = np.asarray(values)
    except ValueError:
        raise ValueError(f"{name} has rows of different lengths") from None
    return array.astype(np.float64) if array.dtype.kind in "iu" else array


def _unusable(device: object, error: Exception) -> ValueError:
    return ValueError(f"device {str(device)!r} cannot be used: {str(error).splitlines()[0]}")


def _shown(value: object) -> str:
    return repr(value) if isinstance(value, (bool, int, float, str, np.generic)) else type(value).__name__
