"""Occupancy Networks beyond purification: drawing shapes, seeing voxels or an image, refining meshes."""
