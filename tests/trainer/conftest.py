"""Runs of the trainer in one process."""

from trainer_fixtures import *  # noqa: F403
