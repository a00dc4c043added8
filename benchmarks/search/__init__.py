"""Count the updates that `+sweep=tune`, a plain grid and Optuna need to find a learning rate."""
