"""How far the analysis can be trusted: planted truths, public runs, the benchmark's page.

Nothing else imports it.
"""
