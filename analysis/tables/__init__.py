"""The command line of the package, and its commands on a table made by any program."""
