"""The question `rl`, and what it shares with `rl_bits`: how rewards and ranges of rates compare.

Rewards come as losses, their negative (`analysis.runs.metric`); `rewards` turns them back.
"""
