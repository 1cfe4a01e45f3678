"""Kernels: paged attention for decoding, one source for Metal and CUDA, checked before its first use."""
