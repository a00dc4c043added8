"""The table of actions, what a plan and a status show; `work` does the rest; no torch."""
