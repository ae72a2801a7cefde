"""Kernels in Triton. Imported only where Triton is."""
