"""One rule for each file: from a customer, a model and known figures to a part of the answer.

Refuses to know tables and pages.
"""
