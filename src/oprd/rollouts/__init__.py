"""From prompts to rows: datasets, generation by transformers or vLLM, which rows of a rollout are supervised.

Imports `models` and what that may import.
"""
