"""Laws over many cells: of the best rates, of their ratio, and of the rank that is needed."""
