"""CPU kernels over NumPy arrays: fingerprints and optimizer replay. Serial, without the GIL, no torch."""
