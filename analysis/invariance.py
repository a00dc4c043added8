"""Stub while runs are made."""
ESTIMANDS = LOG_ESTIMANDS = ()
