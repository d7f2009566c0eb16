"""What tokens spell, which positions of two tokenizers pair, and prompts as a chat template renders them.

Imports `foundation` alone.
"""
