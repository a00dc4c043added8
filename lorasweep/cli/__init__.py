"""What each action of the command line does, and what people see of it.

Knows no torch and no scheduler by name.
"""
