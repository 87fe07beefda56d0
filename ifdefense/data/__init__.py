"""Readers and writers of point clouds and meshes, and ModelNet40."""

from ifdefense.data.cloudset import CloudSet, MeshSet
from ifdefense.data.formats import read_cloud, read_clouds, read_mesh, write_cloud, write_clouds, write_mesh
from ifdefense.data.layouts import detect_layout, load_part
from ifdefense.data.modelnet import holdout, load_modelnet40
from ifdefense.data.packed import DataError, load_packed_meshes

__all__ = [
    "CloudSet",
    "DataError",
    "MeshSet",
    "detect_layout",
    "holdout",
    "load_modelnet40",
    "load_packed_meshes",
    "load_part",
    "read_cloud",
    "read_clouds",
    "read_mesh",
    "write_cloud",
    "write_clouds",
    "write_mesh",
]
