"""Compare two results. Knows neither tokens nor data sets."""
