"""Public labelled data sets that the library reads: their origin, licence, size and layout."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class DataSet:
    """A public data set.

    Attributes:
        title: what it is.
        source: address of its page.
        licence: conditions of use.
        size: of the download.
        layout: of its folder, see docs/data.md.
        fetched: name of PyTorch Geometric's ``ModelNet`` if `ifdefense.data.fetching.fetch` downloads it.
        instructions: how to get it otherwise; ``FOLDER`` is its folder.
    """

    title: str
    source: str
    licence: str
    size: str
    layout: str
    fetched: str | None = None
    instructions: str = ""


_SAMPLED = "packed: train_0.npz, test.npz, classes.txt with 1,024 points per mesh"

CATALOGUE = {
    "modelnet40": DataSet(
        "12,311 CAD models of 40 classes, 9,843 for training",
        "https://modelnet.cs.princeton.edu",
        "academic use; the models belong to their authors",
        "2.0 GB of meshes, 0.1 GB once sampled",
        _SAMPLED,
        fetched="40",
    ),
    "modelnet10": DataSet(
        "4,899 CAD models of 10 classes, 3,991 for training, a subset of ModelNet40",
        "https://modelnet.cs.princeton.edu",
        "academic use; the models belong to their authors",
        "0.5 GB of meshes, 0.03 GB once sampled",
        _SAMPLED,
        fetched="10",
    ),
    "modelnet40-c": DataSet(
        "ModelNet40's test clouds with 15 corruptions of 5 severities",
        "https://github.com/jiachens/ModelNet40-C",
        "as ModelNet40",
        "about 2 GB",
        "data_CORRUPTION_SEVERITY.npy, label.npy",
        instructions="run the repository's download.sh modelnet40_c and copy the .npy files to FOLDER",
    ),
    "modelnet-c": DataSet(
        "ModelNet40's test clouds with 7 corruptions of 5 levels",
        "https://pointcloud-c.github.io",
        "CC BY-NC-SA 4.0",
        "about 1 GB",
        "clean.h5, CORRUPTION_LEVEL.h5",
        instructions="download modelnet_c.zip from its page and copy the .h5 files to FOLDER",
    ),
    "scanobjectnn": DataSet(
        "scans of about 2,900 indoor objects of 15 classes, in several variants",
        "https://hkust-vgd.github.io/scanobjectnn",
        "terms of use, accepted in a form on its page",
        "several GB",
        "main_split/, main_split_nobg/ with training_VARIANT.h5, test_VARIANT.h5",
        instructions="accept the terms on its page, and unpack h5_files.zip so that FOLDER has main_split/",
    ),
    "shapenetpart": DataSet(
        "16,881 CAD models of 16 classes of ShapeNet",
        "https://shapenet.org",
        "ShapeNet's terms of use: non-commercial research",
        "about 0.4 GB",
        "ply_data_PART*.h5, all_object_categories.txt",
        instructions="get shapenet_part_seg_hdf5_data with an account of its page, and unpack it to FOLDER",
    ),
}
"""Data sets by name. A data set is read from the folder of its name in ``IFDEFENSE_DATA``."""


def hint(name: str) -> str:
    """Sentence that names the command for a missing data set; empty if it is not public."""
    return f"; `ifdefense data {name}` says how to get it" if name in CATALOGUE else ""
