"""Occupancy Networks beyond purification: generation, voxel and image input, mesh refinement."""
