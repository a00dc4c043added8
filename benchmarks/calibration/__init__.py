"""Check intervals and verdicts on simulated sweeps, which are fitted and judged like real ones."""
