"""Data: readers of what people have, ModelNet40, corruption, and a procedural set that needs no download."""

from .cloudset import CloudSet, MeshSet
from .corruption import CorruptionOptions, corrupt
from .formats import read_cloud, read_clouds, read_mesh, write_cloud, write_clouds, write_mesh
from .layouts import detect_layout, load_part
from .modelnet import holdout, load_modelnet40
from .packed import DataError, load_packed_meshes
from .procedural import Shape, make_dataset, make_shape, make_shapes

__all__ = [
    "CloudSet",
    "CorruptionOptions",
    "DataError",
    "MeshSet",
    "Shape",
    "corrupt",
    "detect_layout",
    "holdout",
    "load_modelnet40",
    "load_packed_meshes",
    "load_part",
    "make_dataset",
    "make_shape",
    "make_shapes",
    "read_cloud",
    "read_clouds",
    "read_mesh",
    "write_cloud",
    "write_clouds",
    "write_mesh",
]
