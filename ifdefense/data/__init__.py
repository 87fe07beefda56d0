"""Readers and writers of point clouds and meshes, and ModelNet40."""

from ifdefense.data.cloudset import CloudSet, MeshSet
from ifdefense.data.errors import DataError
from ifdefense.data.formats import (
    CloudFile,
    PointTable,
    read_cloud,
    read_cloud_file,
    read_clouds,
    read_mesh,
    write_cloud,
    write_cloud_file,
    write_clouds,
    write_mesh,
)
from ifdefense.data.layouts import detect_layout, load_part
from ifdefense.data.modelnet import holdout, load_modelnet40
from ifdefense.data.packed import load_packed_meshes

__all__ = [
    "CloudFile",
    "CloudSet",
    "DataError",
    "MeshSet",
    "PointTable",
    "detect_layout",
    "holdout",
    "load_modelnet40",
    "load_packed_meshes",
    "load_part",
    "read_cloud",
    "read_cloud_file",
    "read_clouds",
    "read_mesh",
    "write_cloud",
    "write_cloud_file",
    "write_clouds",
    "write_mesh",
]
