"""action=check_gpu: measure a machine and compare it with the plan; no customers, no cli."""
