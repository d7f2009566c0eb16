"""Modules and operations that count their runs, or must not run."""

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def refuse(*args, **kwargs):
    raise AssertionError("this module must not run")


def refuse_updates(trainer, module, when=lambda: True):
    """Make `module` raise outside generation, where it has to run."""
    generate, generating = trainer._generate_single_turn, []

    def marked(*args, **kwargs):
        generating.append(True)
        try:
            return generate(*args, **kwargs)
        finally:
            generating.pop()

    trainer._generate_single_turn = marked
    module.register_forward_pre_hook(lambda *_: refuse() if when() and not generating else None)


class Calls:
    def __init__(self, *modules: nn.Module):
        self.count = 0
        for module in modules:
            module.register_forward_pre_hook(self._add)

    def _add(self, *_):
        self.count += 1


class Runs(TorchDispatchMode):
    """Counts the runs of an operation."""

    def __init__(self, op):
        super().__init__()
        self.op, self.count = op, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is self.op
        return func(*args, **(kwargs or {}))
