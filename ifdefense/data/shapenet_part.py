"""ShapeNetPart (Yi et al., 2016), in both releases, y up like ShapeNet.

``shapenet_part_seg_hdf5_data`` (Qi et al., arXiv:1612.00593; its part_seg/train.py lists the files):
``ply_data_train0.h5`` and so on, with ``data``, ``label`` and ``pid``, and ``all_object_categories.txt``.
``shapenetcore_partanno_segmentation_benchmark_v0_normal`` (Qi et al., arXiv:1706.02413): ``SYNSET/NAME.txt``
with positions, normals and part labels, ``synsetoffset2category.txt`` and lists in ``train_test_split``.
Labels are those of shapes; part labels are not read.
"""

from __future__ import annotations

import json
from pathlib import Path

from ifdefense.data.cloudset import CloudSet
from ifdefense.data.errors import DataError
from ifdefense.data.packed import read_classes
from ifdefense.data.parts import (
    Request,
    cloud_set,
    found,
    numbered,
    read_ply_data,
    read_rows,
    stacked,
)

# fmt: off
CLASSES = (
    "Airplane", "Bag", "Cap", "Car", "Chair", "Earphone", "Guitar", "Knife", "Lamp", "Laptop", "Motorbike",
    "Mug", "Pistol", "Rocket", "Skateboard", "Table",
)
# fmt: on


def is_hdf5(root: Path) -> bool:
    """Whether a folder is the HDF5 release; ModelNet40's has no validation files."""
    return any(root.glob("ply_data_val*.h5")) or (root / "all_object_categories.txt").is_file()


def read_hdf5(root: Path, request: Request) -> CloudSet:
    """Reads a part of the HDF5 release."""
    points, labels, names = read_ply_data(root, request, numbered)
    return cloud_set(points, labels, names, CLASSES)


def is_text(root: Path) -> bool:
    """Whether a folder is the text release."""
    return (root / "synsetoffset2category.txt").is_file()


def read_text(root: Path, request: Request) -> CloudSet:
    """Reads a part of the text release."""
    lines = [line.split() for line in read_classes(root / "synsetoffset2category.txt")]
    folders = {line[-1]: index for index, line in enumerate(lines)}
    listing = root / "train_test_split" / f"shuffled_{request.part}_file_list.json"
    try:
        entries = [entry.split("/")[-2:] for entry in json.loads(listing.read_text(encoding="utf-8"))]
        labels = [folders[folder] for folder, _ in entries]
    except OSError:
        raise DataError(
            f"{listing}: there is no such file, so the {request.part} part is not known"
        ) from None
    except (ValueError, KeyError, AttributeError) as error:
        raise DataError(f"{listing}: not a list of shapes of these classes: {error}") from None
    paths = [root / folder / f"{name}.txt" for folder, name in entries]
    points = stacked(
        [read_rows(path, request.points) for path in found(paths, root, request.part)], request.points, paths
    )
    return cloud_set(points, labels, [path.stem for path in paths], tuple(line[0] for line in lines))
