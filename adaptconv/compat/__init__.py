"""Drop-in layers for other packages: their names, arguments, checkpoints and numbers, computed by adaptconv."""
