"""Validation of the analysis: simulated sweeps, public runs, and the benchmark's page.

Nothing else imports it.
"""
