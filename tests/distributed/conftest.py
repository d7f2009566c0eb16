"""Runs of the trainer in two processes."""

from trainer_fixtures import *  # noqa: F403
