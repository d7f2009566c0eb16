"""What every room stands on: errors for the user, recipes as text, ranges of keys, ranks, signals, meters.

Imports nothing of this package.
"""
