"""Output folders: locks, whole files, checkpoints, metrics, and what a resumed run may change.

Imports `models` and what that may import.
"""
