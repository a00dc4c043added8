"""Answers about anyone's table of runs: what `fit`, `ratio`, `drift`, `law` and `html` return.

Refuses to know sweeps and claims; prints nothing.
"""
