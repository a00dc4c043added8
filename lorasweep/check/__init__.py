"""action=check_gpu: measure one machine and compare it with the plan; knows no customers, no cli."""
