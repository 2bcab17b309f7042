"""Parallel: the mesh, the rules from logical axes to mesh axes, the experts' exchange, and the hosts."""
