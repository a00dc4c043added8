"""The best learning rate of one LR curve: likelihood, shape and posterior.

The package knows no arms and no claims. A "valley" is the loss over ln(lr) around its one minimum.
"""
