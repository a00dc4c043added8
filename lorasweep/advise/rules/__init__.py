"""One file a rule: from a customer, a shape and known figures to a part of the answer, traced.

Refuses to know files, tables and pages.
"""
