"""`python -m oprd.cli`, for launchers that take a module."""

import sys

from oprd.cli.commands import main

sys.exit(main())
