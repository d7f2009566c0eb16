"""The documents keep their promises: every symbol and test that they name exists."""

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "docs" / "method.md").read_text().splitlines()
    if re.match(r"\| (Eq\.|§|the release)", line)
]


def test_every_equation_is_listed():
    assert {f"Eq. {n}" for n in (2, 3, 4, 5, 6, 7, 11, 12, 13, 14, 15, 30)} <= {row[0] for row in ROWS}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]} {row[2]}")
def test_symbol_and_test_exist(row):
    module, _, symbol = row[2].strip("`").partition(":")
    target = importlib.import_module(module)
    for name in symbol.split("."):
        target = getattr(target, name)
    assert target.__doc__
    file, _, test = row[3].strip("`").partition("::")
    functions = {node.name for node in ast.parse((ROOT / file).read_text()).body if hasattr(node, "name")}
    assert test in functions


FATES = [
    row.strip("|").split("|")
    for row in (ROOT / "docs" / "reliability.md").read_text().splitlines()
    if row.startswith("|") and not row.startswith(("|---", "| what happens |"))
]


@pytest.mark.parametrize("row", FATES, ids=lambda row: row[0].strip())
def test_each_fate_of_a_folder_has_a_test(row):
    _, what_oprd_does, tests = row
    assert what_oprd_does.strip()
    named = [test.partition("::") for test in re.findall(r"`(\S+)`", tests)]
    assert named
    for file, _, test in named:
        (path,) = (ROOT / "tests").rglob(file)
        assert f"\ndef {test}(" in path.read_text()


@pytest.mark.parametrize("document", ["README.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))])
def test_links_inside_the_repository_resolve(document):
    text = (ROOT / document).read_text()
    targets = [t for t in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in t]
    missing = [t for t in targets if not ((ROOT / document).parent / t).exists()]
    assert not missing


def test_every_key_of_ours_is_documented():
    from dataclasses import fields

    from oprd.bridge.recipe import BridgeArguments
    from oprd.objective.settings import ObjectiveSettings
    from oprd.training.train import RunArguments

    text = (ROOT / "docs" / "recipes.md").read_text()
    names = [
        field.name for kind in (ObjectiveSettings, RunArguments, BridgeArguments) for field in fields(kind)
    ]
    assert [name for name in names if f"`{name}`" not in text] == []
