"""`python -m oprd.cli`, for launchers that take a module."""

from oprd.cli.commands import main

main()
