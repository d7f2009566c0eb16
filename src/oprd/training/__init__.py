"""Training: one step's loss (`step.py`), the trainer on TRL, and `oprd train`.

Imports every package but `preflight` and `cli`.
"""
