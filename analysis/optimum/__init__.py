"""The best learning rate of one lr curve: likelihood, shape and posterior.

Knows no arms and no claims. A "valley" is the loss over ln(lr): it has one minimum.
"""
