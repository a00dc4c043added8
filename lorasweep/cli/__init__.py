"""The actions of the command line, and their output.

This package does not import torch; `launch` trains runs.
"""
