"""What is missing, what goes together, what it costs.

Refuses to know torch, and asks nothing of this machine by itself.
"""
