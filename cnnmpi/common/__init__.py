"""What several rooms of the package need, and no more: files, HDF5, texts from anyone, the arguments of operations."""
