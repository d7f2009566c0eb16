"""The equations on tensors: layers and rows (Eq. 11), losses of states (Eq. 6, 14) and tokens (Eq. 2-5).

Also their weighted sum (Eq. 7) and the keys that choose among them. Imports `foundation` alone.
"""
