"""Checks before a run: `oprd doctor`, `--dry_run`, and the memory plan.

Imports every room but `cli`.
"""
