"""What a command does: train, search, train again, judge; no torch: `launch` trains runs."""
