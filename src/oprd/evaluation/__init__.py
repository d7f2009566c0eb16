"""Sampling, grading and summarising: `oprd eval` and the tables of `oprd demo`.

Imports `folders`, `rollouts` and what they may import.
"""
