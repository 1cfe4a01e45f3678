"""Computes steps on the device: weights, pages, attention, sampler. The only layer that imports MLX."""
