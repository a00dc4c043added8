"""What action=plan prints: for this machine, and for given GPUs.

Refuses to start anything but the measurement of packs.
"""
