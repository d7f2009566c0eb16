"""What every package uses: errors for the user, recipes as text, ranges of keys, ranks, signals, meters.

Imports nothing of this package.
"""
