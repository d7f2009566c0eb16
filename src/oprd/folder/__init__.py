"""A run's folder: what is written there, whole or not at all, and taken up again."""
