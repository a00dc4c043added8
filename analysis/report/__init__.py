"""What people read: reports, pages, figures.

Computes nothing.
"""
