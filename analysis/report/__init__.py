"""What people read of a sweep or of the whole study: reports, pages, figures.

Refuses to fit anything: it shows what the questions found.
"""
