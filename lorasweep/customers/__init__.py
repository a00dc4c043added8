"""The table of customers: read it, advise each one, measure their data, train their adapters.

Refuses to know torch, Hydra and the analysis: kept results are read as files, models are handed in.
"""
