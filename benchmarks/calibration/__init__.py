"""Intervals and verdicts on simulated sweeps, fitted and judged exactly like real ones."""
