"""Reports, pages and figures of a sweep or of the whole study.

Shows what the questions found; judges nothing.
"""
