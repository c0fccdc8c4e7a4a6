"""sparse: an implicit matrix product over a list of taps, channels innermost."""
