"""Benchmarks; comparisons of plan and adviser with published figures; calibration of statistics.

This package may import lorasweep and analysis, and neither imports it. `python -m benchmarks` lists
the benchmarks. The wheel does not contain the package.
"""
