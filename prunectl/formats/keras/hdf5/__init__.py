"""HDF5 files: read, rewritten and rebuilt, in a sandbox where libhdf5 is needed."""
