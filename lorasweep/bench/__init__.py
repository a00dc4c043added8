"""The benchmark (`make bench`): lorasweep against what a user would do without it, on one machine
in one run.

Refuses to be part of the product: nothing outside imports it. TRL is needed here only (extra
`bench`).
"""
