"""More than one device: the mesh, what lies where on it, and the processes that hold it together."""
