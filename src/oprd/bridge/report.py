"""`report.json`: what a bridge says of itself, for people and scripts."""

import json
from pathlib import Path

from oprd.bridge.artifact import Bridge
from oprd.folders.whole import write_whole

REPORT_FILE = "report.json"


def _report(bridge: Bridge) -> str:
    return json.dumps(bridge.metadata, indent=1) + "\n"


def report_is_of(folder: Path, bridge: Bridge) -> bool:
    """Whether the report in a folder says what its bridge says."""
    file = folder / REPORT_FILE
    return file.exists() and file.read_bytes() == _report(bridge).encode()


def write_report(folder: Path, bridge: Bridge) -> None:
    """Write what a bridge says of itself beside it."""
    write_whole(folder / REPORT_FILE, _report(bridge))
