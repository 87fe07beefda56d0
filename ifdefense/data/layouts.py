"""Finds out how a folder lays out its labelled clouds, and reads its training or its test part.

Known are this project's packed files, ``modelnet40_ply_hdf5_2048`` (Qi et al., arXiv:1612.00593),
``modelnet40_normal_resampled`` (Qi et al., arXiv:1706.02413), folders of meshes or clouds laid out like
ModelNet's (Wu et al., arXiv:1406.5670), what PyTorch Geometric's ``ModelNet`` leaves behind, and IF-Defense's
npz files (Wu et al., arXiv:2010.05272).
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ifdefense.data.cloudset import CloudSet
from ifdefense.data.errors import DataError, optional
from ifdefense.data.formats import CLOUD_SUFFIXES, hdf5, read_cloud, text
from ifdefense.data.formats.arrays import Arrays, clouds_of, read_npz
from ifdefense.data.formats.files import naming, read_bytes
from ifdefense.data.formats.table import Options, checked_points
from ifdefense.data.packed import load_packed_clouds, read_classes, require
from ifdefense.geometry.mesh import Mesh
from ifdefense.geometry.sampling import sample_surface

Part = Literal["train", "test"]
Reader = Callable[[Path, Part, int], CloudSet]

# fmt: off
MODELNET40_CLASSES = (
    "airplane", "bathtub", "bed", "bench", "bookshelf", "bottle", "bowl", "car", "chair", "cone", "cup",
    "curtain", "desk", "door", "dresser", "flower_pot", "glass_box", "guitar", "keyboard", "lamp",
    "laptop", "mantel", "monitor", "night_stand", "person", "piano", "plant", "radio", "range_hood",
    "sink", "sofa", "stairs", "stool", "table", "tent", "toilet", "tv_stand", "vase", "wardrobe", "xbox",
)
MODELNET10_CLASSES = (
    "bathtub", "bed", "chair", "desk", "dresser", "monitor", "night_stand", "sofa", "table", "toilet",
)
# fmt: on


def detect_layout(root: str | Path) -> str:
    """The name of the layout of a folder or npz file, one of `LAYOUTS`.

    Raises:
        DataError: if there is nothing there, or its layout is not known.
    """
    root = Path(root)
    if not root.exists():
        raise DataError(f"{root}: there is no such file or folder")
    for name, (matches, _) in LAYOUTS.items():
        if matches(root):
            return name
    raise DataError(f"{root}: its layout is not known; known are {', '.join(LAYOUTS)}")


def load_part(root: str | Path, part: Part, num_points: int = 1024) -> CloudSet:
    """Reads the training or the test part of labelled clouds in any known layout.

    Args:
        root: folder, or npz file of IF-Defense.
        part: ``"train"`` or ``"test"``, as the source has them.
        num_points: points a cloud: the first of those stored, as is the custom with these data, or drawn
            uniformly from the surface where meshes are stored.

    Returns:
        Clouds in the frame of the source.

    Raises:
        DataError: if the layout is not known, the part is not there, or a file cannot be used.
        ImportError: if the package that reads this layout is not installed.
    """
    root = Path(root)
    _, read = LAYOUTS[detect_layout(root)]
    try:
        return read(root, part, num_points)
    except DataError:
        raise
    except ValueError as error:  # clouds and labels that were read but do not fit each other
        raise DataError(f"{root}: {error}") from error


def _read_packed(root: Path, part: Part, num_points: int) -> CloudSet:
    paths = sorted(root.glob("test.npz" if part == "test" else "train_*.npz"))
    clouds = load_packed_clouds(_some(paths, root, part))
    points = _first(clouds.points, num_points, root)
    return CloudSet(points, clouds.labels, clouds.names, clouds.classes)


def _read_hdf5(root: Path, part: Part, num_points: int) -> CloudSet:
    points, labels, names = [], [], []
    for path in _some(sorted(root.glob(f"ply_data_{part}*.h5")), root, part):
        arrays = _read_hdf5_arrays(path)
        require(arrays, ("data", "label"), path)
        points.append(_first(_batch(arrays["data"], path), num_points, path))
        labels.append(arrays["label"].reshape(-1))
        names += _names_beside(path, part, len(points[-1]))
    classes = read_classes(root / "shape_names.txt")
    return _cloud_set(np.concatenate(points), np.concatenate(labels), names, classes)


def _names_beside(path: Path, part: Part, count: int) -> list[str]:
    """Names of the shapes of an h5 file, from the list that lies beside it where it does."""
    number = path.stem.removeprefix(f"ply_data_{part}")
    listing = path.with_name(f"ply_data_{part}_{number}_id2file.json")
    if not listing.is_file():
        return [f"{path.stem}_{index:04d}" for index in range(count)]
    return [Path(entry).stem for entry in json.loads(listing.read_text(encoding="utf-8"))]


def _read_resampled(root: Path, part: Part, num_points: int) -> CloudSet:
    names_file = max(root.glob("modelnet*_shape_names.txt"))  # the list of ModelNet10 lies there too
    classes = read_classes(names_file)
    names = read_classes(names_file.with_name(names_file.name.replace("shape_names", part)))
    paths = [root / name.rpartition("_")[0] / f"{name}.txt" for name in names]
    points = [_of_size(_read_text(path, num_points), num_points, path) for path in paths]
    return _cloud_set(np.stack(points), [classes.index(path.parent.name) for path in paths], names, classes)


def _read_hdf5_arrays(path: Path) -> Arrays:
    with naming(path):
        return hdf5.load(read_bytes(path, Options()), Options())


def _read_text(path: Path, max_rows: int) -> NDArray[np.float64]:
    """The first points of a file without a line of names."""
    options = Options(max_rows=max_rows)
    with naming(path):
        return text.decode(read_bytes(path, options), options).clouds[0].points


def _read_folders(root: Path, part: Part, num_points: int) -> CloudSet:
    classes = tuple(sorted(folder.parent.name for folder in root.glob(f"*/{part}") if folder.is_dir()))
    paths = [path for name in classes for path in sorted((root / name / part).iterdir())]
    paths = _some([path for path in paths if path.suffix.lower() in CLOUD_SUFFIXES], root, part)
    points = [_of_size(read_cloud(path, mesh_points=num_points), num_points, path) for path in paths]
    labels = [classes.index(path.parent.parent.name) for path in paths]
    return _cloud_set(np.stack(points), labels, [path.stem for path in paths], classes)


def _read_geometric(root: Path, part: Part, num_points: int) -> CloudSet:
    path = root / "processed" / ("test.pt" if part == "test" else "training.pt")
    data, slices = _load_geometric(path)
    points = []
    for index in range(len(slices["pos"]) - 1):
        pos = data["pos"][slices["pos"][index] : slices["pos"][index + 1]].numpy()
        if "face" in data:
            faces = data["face"][:, slices["face"][index] : slices["face"][index + 1]].numpy().T
            rng = np.random.default_rng(index)
            pos = sample_surface(Mesh(pos, faces), num_points, generator=rng)[0]
        points.append(_of_size(_checked(pos, index, path), num_points, path))
    labels = data["y"].reshape(-1).numpy()
    names = [f"{path.stem}_{index:05d}" for index in range(len(points))]
    return _cloud_set(np.stack(points), labels, names, _geometric_classes(root, labels))


def _load_geometric(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What an `InMemoryDataset` saved: its joined tensors and where each example starts."""
    geometric = optional("torch_geometric.data", "torch-geometric")
    try:
        with torch.serialization.safe_globals([geometric.Data]):
            data, slices, *_ = torch.load(path, weights_only=True)
        return {key: data[key] for key in ("pos", "y", "face") if data.get(key) is not None}, slices
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file") from None
    except (OSError, EOFError, RuntimeError, ValueError, TypeError, pickle.UnpicklingError) as error:
        # The text of the error may advise to load the file unsafely.
        reason = str(error).partition("\n")[0] if isinstance(error, OSError) else type(error).__name__
        raise DataError(f"{path}: not what torch_geometric.datasets.ModelNet saves ({reason})") from None


def _geometric_classes(root: Path, labels: NDArray[Any]) -> tuple[str, ...]:
    """Labels count the sorted raw folders; without those, their number tells ModelNet10 from 40."""
    raw = sorted(folder.name for folder in (root / "raw").glob("*/"))
    return tuple(raw) or (
        MODELNET10_CLASSES if labels.max() < len(MODELNET10_CLASSES) else MODELNET40_CLASSES
    )


def _read_if_defense(path: Path, part: Part, num_points: int) -> CloudSet:
    arrays = read_npz(path)
    require(arrays, (f"{part}_pc", f"{part}_label"), path)
    points = _first(_batch(arrays[f"{part}_pc"], path), num_points, path)
    targets = arrays.get("target_label") if part == "test" else None
    names = [f"{path.stem}_{index:04d}" for index in range(len(points))]
    return _cloud_set(points, arrays[f"{part}_label"].reshape(-1), names, MODELNET40_CLASSES, targets)


LAYOUTS: dict[str, tuple[Callable[[Path], bool], Reader]] = {
    "packed": (lambda root: any(root.glob("train_*.npz")) or (root / "test.npz").is_file(), _read_packed),
    "modelnet40_ply_hdf5_2048": (lambda root: any(root.glob("ply_data_*.h5")), _read_hdf5),
    "modelnet40_normal_resampled": (
        lambda root: any(root.glob("modelnet*_shape_names.txt")),
        _read_resampled,
    ),
    "torch_geometric": (lambda root: any(root.glob("processed/*.pt")), _read_geometric),
    "CLASS/train|test/*": (lambda root: any(root.glob("*/train")) or any(root.glob("*/test")), _read_folders),
    "IF-Defense npz": (lambda root: root.is_file() and root.suffix == ".npz", _read_if_defense),
}
"""Name of each layout, how it is recognised and how a part of it is read."""


def _cloud_set(
    points: NDArray[Any],
    labels: Iterable[int] | NDArray[Any],
    names: Iterable[str],
    classes: tuple[str, ...],
    targets: NDArray[Any] | None = None,
) -> CloudSet:
    return CloudSet(
        points=points.astype(np.float32),
        labels=np.asarray(labels, dtype=np.int64),
        names=np.asarray(names, dtype=np.str_),
        classes=classes,
        targets=None if targets is None else targets.reshape(-1).astype(np.int64),
    )


def _some(paths: list[Path], root: Path, part: Part) -> list[Path]:
    if not paths:
        raise DataError(f"{root}: there are no files of the {part} part in it")
    return paths


def _batch(clouds: NDArray[Any], path: Path) -> NDArray[np.float64]:
    """The clouds ``(S, N, 3)`` of an array, checked."""
    if clouds.ndim != 3:
        raise DataError(f"{path}: the clouds must be (S, N, 3), got {clouds.shape}")
    with naming(path):
        file = clouds_of({"points": clouds}, Options(), "npz")
        return np.stack([cloud.points for cloud in file.clouds])


def _checked(points: NDArray[Any], index: int, path: Path) -> NDArray[np.float64]:
    with naming(path):
        return checked_points(points, f"cloud {index}, ")


def _first(clouds: NDArray[Any], num_points: int, path: Path) -> NDArray[Any]:
    if clouds.shape[1] < num_points:
        raise DataError(f"{path}: its clouds have {clouds.shape[1]} points, {num_points} are asked for")
    return clouds[:, :num_points]


def _of_size(points: NDArray[Any], num_points: int, path: Path) -> NDArray[Any]:
    cut: NDArray[Any] = _first(points[None], num_points, path)[0]
    return cut
