"""Whole models through ``optimize`` against plain ``torch.compile``: values, graphs, recompilations, compile time."""
