"""Measuring: reconstruction, distances between sets of images, and linear probes; every number has its
protocol."""
