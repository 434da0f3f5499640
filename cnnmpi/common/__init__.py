"""What several rooms of the package need, and no more: whole files, HDF5, texts from anyone, arguments of losses."""
