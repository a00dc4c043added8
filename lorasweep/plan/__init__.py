"""Plan a sweep: which runs are missing, which train together, what it costs.

Refuses to know torch. Only detect.py looks at this machine.
"""
