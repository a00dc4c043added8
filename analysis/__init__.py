"""Turn a table of runs into verdicts.

Uses numpy, pandas, scipy and matplotlib; never torch, hydra or a scheduler.
"""
