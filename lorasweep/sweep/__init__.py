"""A sweep: a question, claims with margins, the runs that answer it; no files, costs or torch."""
