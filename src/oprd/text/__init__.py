"""Token-to-byte decoding, alignment of two tokenizations, and prompts rendered by chat templates.

Imports `foundation` alone.
"""
