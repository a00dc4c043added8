"""The pages over all answers: analysis/results/README.md, and a study's own page.

Reads answers from their folders, pools and shows them. Knows no way to fit or judge runs.
"""
