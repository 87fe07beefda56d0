"""Point operations, frames, normals and triangle meshes."""
