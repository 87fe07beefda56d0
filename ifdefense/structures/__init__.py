"""Clouds and meshes of other libraries, such as ``Batch``, ``Pointclouds`` and ``Trimesh``."""
