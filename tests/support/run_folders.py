"""What of a run folder is compared with another, or with itself before."""

import torch
from safetensors.torch import load_file

from oprd.folders.recorder import read_metrics


def lasting(folder):
    """The metrics that a resumed run repeats to the last bit."""
    return [
        {k: v for k, v in record.items() if not k.startswith(("time/", "memory/"))}
        for record in read_metrics(folder / "metrics.jsonl")
    ]


def same_weights(one, other):
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def files(folder):
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}
