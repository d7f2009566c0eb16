"""`oprd train --accelerate_config …`: this process becomes `accelerate launch`, which starts the others."""

import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from oprd.foundation.errors import UserError

OTHER_NAMES = {"one_gpu": "single_gpu"}


def launch(config: str, num_processes: int | None, words: Sequence[str]) -> None:
    """Become `accelerate launch` of `oprd train` with `words`; raises `UserError`, never returns.

    `config` is a file of accelerate's, or the name of one of TRL's. With a name, there are as many processes
    as accelerators, unless `num_processes` says how many.
    """
    file = config_file(config)
    if num_processes is None and not Path(config).is_file():
        import torch

        is_alone = yaml.safe_load(file.read_text(encoding="utf-8"))["distributed_type"] == "NO"
        num_processes = 1 if is_alone else max(1, torch.accelerator.device_count())
    count = [] if num_processes is None else ["--num_processes", str(num_processes)]
    command = ["-m", "accelerate.commands.launch", "--config_file", str(file), *count]
    os.execv(sys.executable, [sys.executable, *command, "-m", "oprd.cli", "train", *words])


def check_unlaunched() -> None:
    """Raise `UserError` in a process that a launcher has started."""
    if "LOCAL_RANK" in os.environ:
        raise UserError("--accelerate_config starts a launcher: leave it out under torchrun or accelerate")


def config_file(config: str) -> Path:
    """The file of a configuration; raises `UserError`, naming those that there are, for another name."""
    if Path(config).is_file():
        return Path(config)
    spec = importlib.util.find_spec("trl")
    assert spec is not None and spec.origin is not None
    known = {path.stem: path for path in (Path(spec.origin).parent / "accelerate_configs").glob("*.yaml")}
    name = OTHER_NAMES.get(config, config)
    if name not in known:
        raise UserError(
            f"--accelerate_config: {config} is neither a file nor one of {', '.join(sorted(known))}"
        )
    return known[name]
