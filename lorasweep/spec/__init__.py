"""The settings of a run, as plain frozen values; a hash names the run.

Refuses to know where or how a run is executed.
"""
