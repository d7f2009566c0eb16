"""Plots from the files of runs; never imports the trainer."""
