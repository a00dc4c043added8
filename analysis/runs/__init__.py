"""Tables of finished runs, from lorasweep or other programs, and the curves in these tables."""
