"""One call that checks, tunes and times everything on a GPU: ``python -m benchmarks.gpu --out DIR --minutes 9``."""
