"""What a run is, as plain frozen values with a name (a hash).

Refuses to know where or how a run is executed.
"""
