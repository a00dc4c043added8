"""The benchmark (`make bench`): lorasweep compared with what a user would do without it.

Nothing outside imports it. Only this room needs TRL (extra `bench`).
"""
