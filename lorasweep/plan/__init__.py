"""Plan a sweep: which runs are missing, which train together, what it costs on given hardware.

Refuses to know torch. Only detect.py looks at this machine, which is one more Hardware.
"""
