"""The best learning rate of one LR curve. The package knows no arms and no claims."""
