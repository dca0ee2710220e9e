"""Where the bytes of a model lie, one file a container."""
