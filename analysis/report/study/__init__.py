"""The pages over all answers: analysis/results/README.md, and a study's own page.

Read answers, figures, findings, ledger and page in this order. Judges no runs.
"""
