"""A loss of the user's own as a setting: by name or as a function, as text wherever settings are stored."""

import copy
import json
import logging
import pickle
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

from oprd import losses
from oprd.folders.run_folder import resolved_settings
from oprd.foundation.errors import UserError
from oprd.objective.custom_loss import CustomLoss, named_loss, row_loss
from oprd.objective.settings import ObjectiveSettings
from oprd.training.config import OPRDConfig

EVERY_ROW = torch.ones(1, 1, dtype=torch.bool)  # which none of these losses reads
SOURCE = """
import torch
def distance(student, teacher):
    return (student - teacher).abs().mean(-1)
class Powers:
    @staticmethod
    def cubic(student, teacher):
        return (student - teacher).abs().pow(3).mean(-1)
one_number = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """`module(source)`: a module of that source in the working folder, which Python does not know of."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(source=SOURCE):
        (tmp_path / "my_losses.py").write_text(source)
        sys.modules.pop("my_losses", None)
        return tmp_path

    yield write
    sys.modules.pop("my_losses", None)


def rows():
    return torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("name", "power"), [("distance", 1), ("Powers.cubic", 3)])
def test_a_function_by_name(module, name, power):
    module()
    settings = ObjectiveSettings(representation_loss=f"my_losses:{name}")
    settings.check()
    student, teacher = rows()
    values = row_loss(settings.representation_loss, EVERY_ROW)(student.bfloat16(), teacher)
    assert values.dtype == torch.float32
    expected = (student.bfloat16().float() - teacher).abs().pow(power).mean(-1)
    assert torch.equal(values, expected)


def squares(student, teacher, scale=1.0):
    return scale * (student - teacher).square().sum(-1)


@pytest.mark.parametrize(
    ("function", "name", "scale"),
    [
        (squares, f"{__name__}:squares", 1),
        (partial(squares, scale=2.0), f"{__name__}:squares", 2),
        (lambda s, t: 3 * squares(s, t), f"{__name__}:<lambda>", 3),
    ],
    ids=["function", "partial", "lambda"],
)
def test_a_callable_is_text_to_all_that_stores_settings(tmp_path, function, name, scale):
    config = OPRDConfig(output_dir=str(tmp_path), representation_loss=function, bf16=False, report_to="none")
    stored = json.loads(config.to_json_string())["representation_loss"]
    assert stored.partition("#")[0] == name and len(stored.partition("#")[2]) == 8
    assert type(resolved_settings(config)["representation_loss"]) is str
    assert pickle.loads(pickle.dumps(config)).representation_loss == stored
    student, teacher = rows()
    expected = scale * (student - teacher).square().sum(-1)
    for same in (config, copy.copy(config), copy.deepcopy(config), replace(config, max_steps=3)):
        assert same.representation_loss == stored
        assert torch.equal(row_loss(same.representation_loss, EVERY_ROW)(student, teacher), expected)


def test_other_fixed_arguments_are_another_loss():
    assert named_loss(partial(squares, scale=2.0)) != named_loss(partial(squares, scale=3.0))


def test_our_own_functions_keep_their_names():
    assert named_loss(losses.cosine) == "cosine" and not isinstance(named_loss(losses.mse), CustomLoss)


def test_a_changed_source_is_another_loss(module):
    module()
    first = named_loss("my_losses:distance")
    module()
    assert named_loss("my_losses:distance") == first
    module(SOURCE.replace(".abs().mean(-1)", ".abs().sum(-1)"))
    assert named_loss("my_losses:distance") != first


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (
            "huber",
            "'huber' is not one of mse, normalized_mse, cosine, relative_mse, smooth_l1, phf, nor module",
        ),
        ("nowhere:huber", "there is no module nowhere, neither installed nor in "),
        ("my_losses:distanze", "my_losses has no distanze; did you mean distance?"),
        ("my_losses:Powers.quartic", "my_losses has no quartic"),
        ("my_losses:one_number", "is not a function but of type int"),
        ("lambda s, t: s - t", "is not module:function, such as my_losses:huber"),
        ("my_losses.py:distance", "there is no module my_losses.py"),
        ("my_losses:", "is not module:function"),
        (3, "3 is neither a name nor a function"),
    ],
    ids=str,
)
def test_names_without_a_loss(module, spec, says):
    module()
    with pytest.raises(UserError) as error:
        named_loss(spec)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("import nowhere_else", "my_losses cannot be imported: No module named 'nowhere_else'"),
        ("def f(:", "my_losses cannot be imported: SyntaxError"),
        ("import sys; sys.exit(0)", "my_losses cannot be imported: SystemExit: 0"),
        ("raise RuntimeError('no GPU')", "my_losses cannot be imported: RuntimeError: no GPU"),
    ],
)
def test_modules_that_cannot_be_imported(module, source, says):
    module(source)
    with pytest.raises(UserError, match="representation_loss") as error:
        named_loss("my_losses:f")
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda s, t: (s - t).square().mean(), r"one value for each of 3 rows, \[3\], and returned \[\]"),
        (lambda s, t: (s - t).square(), r"and returned \[3, 6\]"),
        (lambda s, t: 1.0, "and returned float"),
        (lambda s, t: t.sum(-1), "does not depend on the student's rows"),
        (lambda s, t: s.detach().sum(-1), "does not depend on the student's rows"),
        (lambda s, t: (s @ t).sum(-1), r"fails on rows \[3, 6\]: RuntimeError: mat1 and mat2"),
        (lambda s, t: (s - s).norm(dim=-1) / (t - t).norm(dim=-1), "is not finite on random rows"),
    ],
    ids=["a mean", "all entries", "a number", "the teacher alone", "detached", "wrong shapes", "0 / 0"],
)
def test_what_no_step_could_use_is_refused_before_the_first(function, says):
    with pytest.raises(UserError, match=says):
        named_loss(function).check(6, torch.device("cpu"))


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (squares, []),
        (lambda s, t: squares(s, t) + 1, ["is not zero where student and teacher are equal"]),
        (lambda s, t: -squares(s, t), ["has negative values"]),
    ],
    ids=["as ours", "an offset", "negative"],
)
def test_odd_values_are_told(caplog, function, told):
    with caplog.at_level(logging.WARNING, "oprd"):
        named_loss(function).check(4, torch.device("cpu"))
    assert len(caplog.messages) == len(told)
    assert all(words in message for words, message in zip(told, caplog.messages, strict=True))
