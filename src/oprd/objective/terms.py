"""The terms of the objective (Eq. 7 and the anchor), by the names that settings, weights and metrics have."""

REPRESENTATION = "representation"
OUTPUT = "output"
ANCHOR = "anchor"
TERMS = (REPRESENTATION, OUTPUT, ANCHOR)
