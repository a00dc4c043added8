"""What the commands `answer` and `fit` say: of one report, of all, and of any table."""
