"""Benchmarks, the plan and the adviser against published figures, and tests of the statistics.

It may import both packages, and nothing imports it. `python -m benchmarks` lists what it measures;
the wheel does not contain it.
"""
