"""An adapter for each customer of a table: its runs, the rate that is chosen, its card, the page.

Refuses to know torch, the launcher and Hydra: runs are trained as those of any sweep.
"""
