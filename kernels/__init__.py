"""Kernels for fingerprints, optimizer updates and gradients in 16 bits: Numba on the CPU, Triton on a device.

Those on the CPU take NumPy arrays, are serial, and run without the GIL. None needs torch.
"""
