"""The command line: `oprd train`, `eval`, `bridge`, `doctor` and `demo`. May import every package."""

from oprd.cli.commands import main

__all__ = ["main"]
