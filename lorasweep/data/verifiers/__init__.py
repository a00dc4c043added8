"""Compare an answer with the gold answer. Knows neither tokens nor data sets."""
