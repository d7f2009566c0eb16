"""Loading, checking, freezing and sharding models; one backbone forward with hidden states; the LM head.

Imports `foundation`, `objective` and `text`.
"""
