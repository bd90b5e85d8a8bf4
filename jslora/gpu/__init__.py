"""What `scripts/gpu_check.py` runs on a machine with a GPU: correctness, ceilings, kernels, steps.

A section is one process, because a kernel that goes wrong takes its process's device context with
it; `sections` names them, `supervise` runs them within a budget. Sections are pure measurement:
they emit records as they go, and `report` makes a table of whatever was recorded.
"""
