"""The memory plan: what a run will hold, from fake tensors."""
