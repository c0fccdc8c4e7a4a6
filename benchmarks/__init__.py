"""Benchmarks: real layers, small real models and the data they run on."""
