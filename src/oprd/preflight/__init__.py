"""What is found out before a run: `oprd doctor`, `--dry_run`, and the plan of memory.

Imports every room but `cli`.
"""
