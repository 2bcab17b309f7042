"""Where the network lies on many devices: the mesh, the rules from logical axes to mesh axes, and the experts' exchange."""
