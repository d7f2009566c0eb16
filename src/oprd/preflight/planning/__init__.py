"""What a run will hold, found out before it starts."""
