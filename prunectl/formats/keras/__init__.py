"""Files of Keras: HDF5, alone or in a zip."""
