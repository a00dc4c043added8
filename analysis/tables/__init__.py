"""The commands `fit`, `ratio`, `drift`, `law` and `html` on a table made by any program.

Knows no sweeps and claims; prints nothing.
"""
