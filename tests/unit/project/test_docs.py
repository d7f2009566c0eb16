"""The documents keep their promises: names, files, links, keys and commands in them are real."""

import argparse
import ast
import importlib
import importlib.util
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from trl import DistillationConfig

from oprd.bridge.recipe import BridgeArguments, parse_bridge_recipe
from oprd.cli.arguments import parse_command, recipe_and_flags
from oprd.foundation.ranges import EVALUATION_RANGES, check_ranges
from oprd.objective.settings import ObjectiveSettings
from oprd.training.config import OPRDConfig
from oprd.training.run_arguments import RunArguments
from oprd.training.train import parse_training_recipe
from places import ROOT

DOCS = ROOT / "docs"
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md")))
}
GUIDES = {name: text for name, text in PAGES.items() if name != "docs/log.md"}  # the log keeps what was
PLAIN = {name: re.sub(r"^```.*?^```", "", text, flags=re.M | re.S) for name, text in PAGES.items()}
NAMES = ["--model_name_or_path", "tiny:student", "--teacher_model_name_or_path", "tiny:teacher"]
NAMES += ["--dataset_name", "tiny"]


def blocks(language: str) -> list:
    """The fenced blocks of a language, each with the page that holds it."""
    return [
        pytest.param(block, id=f"{name}-{number}")
        for name, text in PAGES.items()
        for number, block in enumerate(re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S))
    ]


# The method and the folders
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


# Names, files and links


def resolve(name: str) -> object:
    """What a dotted name is: a module, or something in one."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            target = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            target = getattr(target, part)
        return target
    raise AssertionError(f"there is no {name}")


@pytest.mark.parametrize("document", GUIDES)
def test_every_dotted_name_resolves(document):
    for name in re.findall(r"`(oprd(?:[.:]\w+)+)`", PLAIN[document]):
        resolve(name.replace(":", "."))


@pytest.mark.parametrize("document", GUIDES)
def test_every_name_in_a_file_is_there(document):
    for file, name in re.findall(r"`([\w/]+\.py)::(\w+)`", PLAIN[document]):
        ours = [*(ROOT / "src").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
        (path,) = [path for path in ours if path.match(file)]
        assert name in {node.name for node in ast.walk(ast.parse(path.read_text())) if hasattr(node, "name")}


@pytest.mark.parametrize("document", GUIDES)
def test_every_file_that_is_named_is_there(document):
    pattern = r"(?<![\w/])(?:src|tests|recipes|benchmarks|examples|docs)/[\w./-]*\w"
    missing = [path for path in re.findall(pattern, GUIDES[document]) if not (ROOT / path).exists()]
    assert missing == []


def slug(heading: str) -> str:
    """The anchor of a heading, as code hosts make it and mkdocs.yml asks for."""
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
    return re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")


def anchors(path: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", text, re.M)}


@pytest.mark.parametrize("document", PAGES)
def test_links_and_anchors_resolve(document):
    here = ROOT / document
    for target in re.findall(r"\]\((\S+?)\)", PLAIN[document]):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        path = (here.parent / file).resolve() if file else here
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target
        if document.startswith("docs/"):  # the site holds this folder alone
            assert path.is_relative_to(DOCS), f"{target} is not part of the site: name it, without a link"


def test_the_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 150


TO_TOUCH = re.findall(
    r"^\| (`[^|]*`.*?) \| (.*) \|$", PAGES["docs/architecture.md"].partition("\n## To add")[2], re.M
)


@pytest.mark.parametrize(("files", "what"), TO_TOUCH)
def test_what_to_touch_is_in_those_files(files, what):
    source = "".join((ROOT / file).read_text() for file in re.findall(r"`(\S+)`", files))
    for name in re.findall(r"`([A-Za-z_.]+)`", what):
        if not name.startswith("oprd."):
            assert all(re.search(rf"\b{part}\b", source) for part in name.split(".")), name


# The site


class _Loader(yaml.SafeLoader):
    """Reads mkdocs.yml without what only mkdocs needs."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)
SITE = yaml.load((ROOT / "mkdocs.yml").read_text(), _Loader)


def pages_of(nav: list | dict | str) -> Iterator[str]:
    """The files of a navigation, in order."""
    if isinstance(nav, str):
        yield nav
    else:
        for entry in nav.values() if isinstance(nav, dict) else nav:
            yield from pages_of(entry)


def test_the_navigation_has_every_page_once():
    listed = list(pages_of(SITE["nav"]))
    assert sorted(listed) == sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))


def test_the_api_page_names_what_the_package_offers():
    import oprd

    shown = [resolve(name) for name in re.findall(r"^::: (\S+)", PAGES["docs/api.md"], re.M)]
    assert [name for name in oprd.__all__ if not any(getattr(oprd, name) is found for found in shown)] == []


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="make docs builds it")
def test_the_site_builds(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Commands


def commands(block: str) -> Iterator[list[str]]:
    """The commands of a shell block as words: without comments, loops, variables and environments."""
    for line in re.sub(r"\\\n", " ", block).splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if not set(word) <= set(";&|"):
                words.append(re.sub(r"\$\w+", "0", word))
                continue
            while words and (words[0] == "do" or re.match(r"[A-Z_]+=", words[0])):
                words.pop(0)
            if words and words[0] not in ("for", "done"):
                yield words
            words = []


def parse_oprd(words: list[str]) -> None:
    """Through the parsers that the command itself uses; raises for what it would refuse."""
    args = argparse.Namespace(command=None)
    rest = parse_command(words, args)
    if args.command in ("train", "bridge", "doctor"):
        if not vars(args).get("help"):
            parse = parse_bridge_recipe if args.command == "bridge" else parse_training_recipe
            recipe, flags = recipe_and_flags(args, rest)
            parse(recipe and ROOT / recipe, flags)
    else:
        check_ranges(vars(args), EVALUATION_RANGES)


def check_command(words: list[str]) -> None:
    """What a command names exists: its module, file, target, extra, flags and keys."""
    program, *rest = words
    if "oprd.cli" in rest:
        for option, file in pairwise(rest):
            assert option != "--config_file" or (ROOT / file).exists()
        rest = rest[rest.index("oprd.cli") + 1 :]
        program = "oprd"
    if program == "oprd":
        try:
            parse_oprd(rest)
        except SystemExit as done:
            assert not done.code
    elif program == "sbatch":
        script = next(i for i, word in enumerate(rest) if word.endswith(".slurm"))
        assert (ROOT / rest[script]).exists()
        parse_oprd(["train", *rest[script + 1 :]])
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text()
        assert all(re.search(rf"^{re.escape(target)}:", makefile, re.M) for target in rest)
    elif program == "python" and rest[0] == "-c":
        ast.parse(rest[1])
    elif program in ("python", "pytest"):
        files = [word for word in rest if word.endswith(".py")]
        assert all((ROOT / file).exists() for file in files)
        if program == "python":
            scripts = [*ROOT.glob("benchmarks/*.py"), *ROOT.glob("examples/*.py")]
            known = "".join(path.read_text() for path in scripts)
            flags = [word.removeprefix("--") for word in rest if word.startswith("--")]
            assert all(re.search(rf'"(--)?{flag}"', known) for flag in flags)
    elif program == "pip":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        extras = re.findall(r"\[(\w+)\]", " ".join(rest))
        assert rest[0] == "install" and project["optional-dependencies"].keys() >= set(extras)
    else:
        assert words[:2] == ["vllm", "serve"], f"what is {program}?"


@pytest.mark.parametrize("block", [*blocks("bash"), *blocks("sh")])
def test_every_command_is_one(block, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = list(commands(block))
    assert found
    for words in found:
        check_command(words)


@pytest.mark.parametrize(
    "wrong", ["oprd train recipes/none.yaml", "oprd train recipes/first.yaml --no_key 1"]
)
def test_a_wrong_command_would_be_found(wrong, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises((AssertionError, ValueError)):
        check_command(shlex.split(wrong))


# Recipes, keys and code


@pytest.mark.parametrize("block", blocks("yaml"))
def test_every_piece_of_a_recipe_is_valid(block, tmp_path):
    (tmp_path / "recipe.yaml").write_text(block)
    parse_training_recipe(tmp_path / "recipe.yaml", NAMES)


@pytest.mark.parametrize("block", blocks("python"))
def test_every_piece_of_python_is_valid(block):
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("oprd"):
            assert all(hasattr(importlib.import_module(node.module), name.name) for name in node.names)


def test_the_quickstart_in_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGES["README.md"], re.M | re.S)
    assert "max_steps=20" in code and re.sub("  #.*", "", code) in PAGES["docs/quickstart.md"]
    exec(code.replace("max_steps=20", "max_steps=1"), {})
    folder = tmp_path / "runs" / "quickstart-python"
    assert (folder / "model.safetensors").exists()
    (step,) = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    named = set(re.findall(r"`([\w/]+)`", PAGES["docs/metrics.md"]))
    assert {re.sub(r"_layer_\d+$", "_layer_l", key) for key in step} - {"step"} <= named


KINDS = (RunArguments, OPRDConfig, BridgeArguments)
KEYS = {field.name: field for kind in reversed(KINDS) for field in fields(kind)}


def test_every_key_of_ours_is_documented():
    ours = [
        field.name for kind in (ObjectiveSettings, RunArguments, BridgeArguments) for field in fields(kind)
    ]
    assert [name for name in ours if f"`{name}`" not in PAGES["docs/recipes.md"]] == []


@pytest.mark.parametrize("document", GUIDES)
def test_every_key_that_is_set_is_one(document):
    inline = re.findall(r"`(\w+): [^`]*`", PLAIN[document])
    assert [name for name in inline if name not in (*KEYS, "device_map")] == []  # that one is transformers'


def key_rows(page: str, heading: str) -> list[tuple[list[str], str]]:
    """The keys and the default of each row in the tables under a heading."""
    section = page.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line.split(" | ") for line in section.splitlines() if line.startswith("| `")]
    return [(re.findall(r"`(\w+)`", row[0]), row[1]) for row in rows]


RECIPES = PAGES["docs/recipes.md"]
TABLES = ("Models and data", "The objective", "Rollouts and steps", "Keys of vLLM", "A bridge")


LATER = ("max_steps", "num_train_epochs", "output_dir")  # defaults that are filled in after the fact


def is_told(told: str, value: object) -> bool:
    """Whether a table says a default as it is."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(told) == value
    return told == str(value).lower()


@pytest.mark.parametrize("heading", TABLES)
def test_the_tables_name_keys_with_their_defaults(heading):
    known = {f.name: f for f in fields(BridgeArguments)} if heading == "A bridge" else KEYS
    compared = 0
    for keys, told in key_rows(RECIPES, heading):
        assert keys and set(keys) <= known.keys()
        defaults = told.replace("`", "").split(", ")
        if len(defaults) != len(keys) or told == "required" or not re.fullmatch(r"[\w\- ,.`]+", told):
            continue  # several sentences, or a mapping
        for key, default in zip(keys, defaults, strict=True):
            if key not in LATER and " " not in default:
                assert is_told(default, known[key].default), key
                compared += 1
    assert compared


def test_the_defaults_beside_those_of_trl():
    page = PAGES["docs/from-trl.md"].split("## Defaults that differ\n")[1].split("\n## ")[0]
    compared = 0
    for line in page.splitlines():
        if line.startswith("| `"):
            keys, theirs, ours = (cell.replace("`", "").split(", ") for cell in line.strip("| ").split(" | "))
            for key, trl, here in zip(keys, theirs, ours, strict=True):
                for told, kind in ((trl, DistillationConfig), (here, OPRDConfig)):
                    default = {field.name: field.default for field in fields(kind)}[key]
                    if re.fullmatch(r"[\w.-]+", told) and told != "all":
                        assert is_told(told, getattr(default, "value", default)), (key, kind)
                        compared += 1
    assert compared > 15


# Around the documents


def test_the_paper_is_cited_with_its_authors():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())["preferred-citation"]
    names = [f"{author['family-names']}, {author['given-names']}" for author in cited["authors"]]
    assert len(names) == 10
    assert " and ".join(names) in re.sub(r"\s+", " ", PAGES["README.md"])


def test_the_workflow_runs_the_tests():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())["jobs"]
    steps = [step.get("run") for job in jobs.values() for step in job["steps"]]
    assert "make test" in steps and "make docs" in steps
