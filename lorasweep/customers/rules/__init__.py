"""One rule for each file: from a customer, a model and known figures to a part of the advice.

Refuses to know tables and pages.
"""
