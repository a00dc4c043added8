"""From a table of runs to a verdict: numpy, pandas, scipy, matplotlib; never torch, hydra or a
scheduler."""
