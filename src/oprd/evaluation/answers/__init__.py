"""Answers: where a response states one, what kind of thing it is, and whether two are the same."""
