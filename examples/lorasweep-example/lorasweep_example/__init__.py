"""A question, a method, a model and a data set for lorasweep."""
