"""Quantities on fitted LR curves, such as rho and ratios; no questions and no claims' wording."""
