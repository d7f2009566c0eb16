"""Checks before a run: `oprd doctor`, `--dry_run`, and the memory plan.

Imports every package but `cli`.
"""
