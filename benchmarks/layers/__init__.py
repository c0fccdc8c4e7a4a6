"""The layer benchmark's parts: operands, torch's ways to compute a layer, ours, and what is said of their times."""
