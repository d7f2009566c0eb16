"""Data flows one way, and only training knows trl: read from the sources."""

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

from places import ROOT

SOURCES = ROOT / "src" / "oprd"
PACKAGES = {  # what each package may import, in the order in which data flows
    "foundation": "",
    "objective": "foundation",
    "text": "foundation",
    "models": "foundation objective text",
    "rollouts": "foundation objective text models",
    "folders": "foundation objective models",
    "bridge": "foundation objective text models rollouts folders",
    "evaluation": "foundation text models rollouts folders",
    "training": "foundation objective text models rollouts folders bridge evaluation",
    "preflight": "foundation objective text models rollouts folders bridge training",
    "cli": "foundation objective text models rollouts folders bridge evaluation training preflight",
}
LEAVES = ["objective.selection", "objective.losses", "objective.output_space", "models.capture"]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(SOURCES.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted(SOURCES.rglob("*.py"))}


def imported_names(name: str) -> set[str]:
    """Every dotted name that a module imports, at its top or inside a function."""
    path = MODULES[name]
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = resolve_name("." * node.level + (node.module or ""), package)
            names |= {source, *(f"{source}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            names |= {arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)}
    return names


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def own_imports(name: str) -> set[str]:
    """The modules of the package that a module imports; `from package import submodule` is the submodule."""
    found = {n for n in imported_names(name) if n in MODULES and n not in ("oprd", name)}
    return {n for n in found if not any(other.startswith(n + ".") for other in found)}


def package(name: str) -> str:
    return name.split(".")[1]


def test_the_sources_are_found():
    assert {package(name) for name in MODULES if name != "oprd"} == PACKAGES.keys()
    assert "oprd.foundation.errors.UserError" in imported_names("oprd.objective.losses")


def test_the_top_of_the_package_is_its_packages():
    entries = {path.name for path in SOURCES.iterdir() if path.name != "__pycache__"}
    assert entries == {"__init__.py", *PACKAGES}


@pytest.mark.parametrize("name", [name for name in MODULES if name != "oprd"])
def test_a_package_imports_those_before_it(name):
    assert {package(imported) for imported in own_imports(name)} <= {
        package(name),
        *PACKAGES[package(name)].split(),
    }


@pytest.mark.parametrize("name", PACKAGES)
def test_each_package_says_what_it_holds(name):
    docstring = ast.get_docstring(ast.parse(MODULES[f"oprd.{name}"].read_text(encoding="utf-8")))
    assert docstring is not None and "mport" in docstring


@pytest.mark.parametrize("name", LEAVES)
def test_leaves_import_only_the_errors_and_foreign_names(name):
    foreign = {"oprd.foundation.foreign.transformers"}
    assert own_imports(f"oprd.{name}") <= {"oprd.foundation.errors"} | foreign


def test_only_the_training_package_imports_trl():
    importers = {name for name in MODULES if any(is_within(n, "trl") for n in imported_names(name))}
    assert {package(name) for name in importers} == {"training"}


def test_imports_have_no_cycle():
    TopologicalSorter({name: own_imports(name) for name in MODULES if name != "oprd"}).prepare()


def test_no_module_is_called_utils():
    assert [
        name for name in MODULES if name.rpartition(".")[2] in ("utils", "util", "helpers", "common")
    ] == []


def test_importing_the_package_and_its_leaves_does_not_import_trl():
    modules = ", ".join(["oprd", *(f"oprd.{name}" for name in LEAVES)])
    script = f"import sys, {modules}; print([m for m in sys.modules if m.split('.')[0] == 'trl'])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


THREADS = """
import os, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"))
            sys.exit()
sys.meta_path.insert(0, Watch())
import oprd
"""


@pytest.mark.parametrize(
    ("given", "is_set"),
    [({}, "5000"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None"), ({"GOMP_SPINCOUNT": "7"}, "7")],
)
def test_threads_that_wait_spin_for_a_short_time_unless_asked_to(given, is_set):
    """OpenMP reads it as torch is loaded."""
    ours = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    environment = {key: value for key, value in os.environ.items() if key not in ours} | given
    command = [sys.executable, "-c", THREADS]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert result.stdout.split() == [is_set]


def is_text(call: ast.Call) -> bool:
    """Whether a call reads or writes a text file."""
    name = ast.unparse(call.func)
    name = name if name == "os.open" else name.rpartition(".")[2]
    modes = [arg.value for arg in call.args if isinstance(arg, ast.Constant)]
    return name in ("read_text", "write_text") or (name == "open" and not any("b" in str(m) for m in modes))


@pytest.mark.parametrize("name", MODULES)
def test_text_files_have_an_encoding_whatever_the_locale(name):
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and is_text(node)]
    for call in calls:
        assert "encoding" in {keyword.arg for keyword in call.keywords}, f"{name}, line {call.lineno}"
