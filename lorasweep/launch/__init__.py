"""Train packs in worker processes on this machine, or in jobs of a cluster.

This package must not depend on the kind of model or method.
"""
