"""What is asked for customers: advice for a table of them, the information in their data, adapters.

Refuses to know how advice is found and how runs are trained.
"""
