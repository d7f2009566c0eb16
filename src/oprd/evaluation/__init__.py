"""Sampling, grading and summarising: `oprd eval` and the table of `oprd demo`."""
