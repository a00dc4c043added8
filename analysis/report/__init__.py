"""Reports, pages and figures of a sweep or of the whole study.

The package shows the results of the questions, and judges nothing.
"""
