"""Read the result of an answer, and compare two results. Knows neither tokens nor data sets."""
