"""What is asked for customers: advice for a table of them, and the information in their data.

Refuses to know how advice is found and how runs are trained.
"""
