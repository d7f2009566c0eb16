"""A representation loss of the user's own: a callable from Python, or `module:function` in a recipe."""

import difflib
import hashlib
import importlib
import inspect
import logging
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from oprd.foundation.errors import UserError, whatever_fails_is
from oprd.objective.losses import REPRESENTATION_LOSSES, RowLoss, checked_rows
from oprd.objective.transitions import phf

logger = logging.getLogger(__name__)

PHF = "phf"  # which reads rows beside one another
NAMES = (*REPRESENTATION_LOSSES, PHF)
SPEC = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
HASH_DIGITS = 8
PROBED_ROWS = 3  # a count that no other dimension is likely to have


class CustomLoss(str):
    """A row loss that is also its name, `module:function#digest`: settings are stored and compared as text.

    The digest is of the function's own source, so that a resumed run notices another loss of that name. A
    pickled copy, as in `training_args.bin`, is the name alone.
    """

    spec: str
    function: Callable[..., Tensor]

    def __new__(cls, name: str, function: Callable[..., Tensor]) -> "CustomLoss":
        digest = _digest(function)
        made = super().__new__(cls, f"{name}#{digest}" if digest else name)
        made.spec, made.function = name, function
        return made

    def __call__(self, student: Float[Tensor, "N D"], teacher: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
        """One value per row, of rows in float32 or wider; no gradient reaches the teacher."""
        student, teacher = checked_rows(student, teacher)
        values = self.function(student, teacher)
        if not isinstance(values, Tensor) or values.shape != student.shape[:1]:
            got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise UserError(
                f"representation_loss: {self.spec} must return one value for each of {len(student)} rows, "
                f"[{len(student)}], and returned {got}: do not average over rows"
            )
        return values

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return str, (str(self),)

    def __deepcopy__(self, _: Any) -> "CustomLoss":
        return self

    def check(self, width: int, device: torch.device) -> None:
        """Try the loss on random rows of `width` on `device`; raises `UserError` for what no step could use.

        Warns of values that are negative, or not zero for equal rows.
        """
        generator = torch.Generator().manual_seed(0)
        student, teacher = torch.randn(2, PROBED_ROWS, width, generator=generator).to(device)
        student = student.requires_grad_()
        with whatever_fails_is(
            lambda error: (
                f"representation_loss: {self.spec} fails on rows [{PROBED_ROWS}, {width}]: "
                f"{type(error).__name__}: {error}"
            )
        ):
            values, equal = self(student, teacher), self(teacher, teacher)
            gradient = None
            if values.requires_grad:
                (gradient,) = torch.autograd.grad(values.sum(), student, allow_unused=True)
        if gradient is None:
            raise UserError(f"representation_loss: {self.spec} does not depend on the student's rows")
        if not (values.isfinite().all() and gradient.isfinite().all()):
            raise UserError(f"representation_loss: {self.spec} or its gradient is not finite on random rows")
        if (values < 0).any():
            logger.warning("representation_loss: %s has negative values", self.spec)
        if equal.abs().max() > 0:
            logger.warning(
                "representation_loss: %s is not zero where student and teacher are equal", self.spec
            )


def row_loss(spec: str, mask: Bool[Tensor, "B T"]) -> RowLoss:
    """The loss of that name, which settings were checked to have, of the rows of `mask`."""
    if spec == PHF:
        return phf(mask)
    return spec if isinstance(spec, CustomLoss) else REPRESENTATION_LOSSES[spec]


def named_loss(spec: str | Callable[..., Tensor]) -> str:
    """The name of a loss: one of ours, or a `CustomLoss` of a callable or `module:function`.

    Modules are looked for in the current folder too, after the places that Python knows. Raises `UserError`
    for a name without a loss.
    """
    if isinstance(spec, CustomLoss) or (isinstance(spec, str) and spec in NAMES):
        return spec
    if not isinstance(spec, str):
        if not callable(spec):
            raise UserError(f"representation_loss: {spec!r} is neither a name nor a function")
        ours = [name for name, loss in REPRESENTATION_LOSSES.items() if loss is spec]
        return ours[0] if ours else CustomLoss(_name(spec), spec)
    if ":" not in spec:
        names = ", ".join(NAMES)
        raise UserError(f"representation_loss: {spec!r} is not one of {names}, nor module:function")
    if not SPEC.fullmatch(spec):
        raise UserError(f"representation_loss: {spec!r} is not module:function, such as my_losses:huber")
    module_name, _, path = spec.partition(":")
    found = _import(module_name)
    for name in path.split("."):
        if not hasattr(found, name):
            close = difflib.get_close_matches(name, dir(found), n=1)
            meant = f"; did you mean {close[0]}?" if close else ""
            raise UserError(f"representation_loss: {spec}: {module_name} has no {name}{meant}")
        found = getattr(found, name)
    if not callable(found):
        raise UserError(f"representation_loss: {spec} is not a function but of type {type(found).__name__}")
    return CustomLoss(spec, found)


def _import(name: str) -> Any:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            where = f"there is no module {error.name}, neither installed nor in {os.getcwd()}"
            raise UserError(f"representation_loss: {where}") from error
        raise UserError(f"representation_loss: {name} cannot be imported: {error}") from error
    except (Exception, SystemExit) as error:
        told = f"{type(error).__name__}: {error}"
        raise UserError(f"representation_loss: {name} cannot be imported: {told}") from error


def _plain(function: Any) -> Any:
    """The function inside partials."""
    return _plain(function.func) if isinstance(function, partial) else function


def _name(function: Any) -> str:
    named = _plain(function)
    named = named if hasattr(named, "__qualname__") else type(named)
    return f"{named.__module__}:{named.__qualname__}"


def _digest(function: Any) -> str | None:
    """A digest of the source and of what partials fix; None where there is no source."""
    plain = _plain(function)
    try:
        source = inspect.getsource(plain if hasattr(plain, "__qualname__") else type(plain))
    except (OSError, TypeError):
        return None
    fixed = repr((function.args, function.keywords)) if isinstance(function, partial) else ""
    return hashlib.sha256((source + fixed).encode()).hexdigest()[:HASH_DIGITS]
