"""The actions of the command line, and their output; no torch: `launch` trains runs."""
