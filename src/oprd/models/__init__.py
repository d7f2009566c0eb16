"""Models: loaded, checked, frozen, sharded; one forward of a backbone with its hidden states; the LM head.

Imports `foundation`, `objective` and `text`.
"""
