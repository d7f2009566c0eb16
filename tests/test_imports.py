"""Data flows one way, and only the trainer knows trl: read from the sources."""

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[1] / "src" / "oprd"
LEAVES = ["selection", "capture", "losses", "output_space"]
BELOW_THE_TRAINER = [
    *LEAVES,
    *("objective", "alignment", "bridge", "prompts", "rollouts", "evaluation", "report", "teacher", "tiny"),
    *("engines", "sharding", "folder", "planning"),
]


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


def reachable(name: str) -> set[str]:
    """A module and all the modules of the package behind it."""
    seen, waiting = set(), [name]
    while waiting:
        module = waiting.pop()
        if module not in seen:
            seen.add(module)
            waiting += own_imports(module)
    return seen


def existing(parts: list[str]) -> list[str]:
    return [name for name in MODULES if any(is_within(name, f"oprd.{part}") for part in parts)]


def test_the_sources_are_found():
    assert {f"oprd.{name}" for name in [*LEAVES, "errors"]} <= MODULES.keys()
    assert "oprd.foundation.errors.UserError" in imported_names("oprd.objective.losses")


@pytest.mark.parametrize("name", existing(BELOW_THE_TRAINER))
def test_nothing_below_the_trainer_reaches_it(name):
    for module in reachable(name):
        assert not is_within(module, "oprd.training.trainer") and not is_within(
            module, "oprd.cli.commands"
        ), module
        assert not any(is_within(imported, "trl") for imported in imported_names(module)), module


@pytest.mark.parametrize("name", existing(LEAVES))
def test_leaves_import_only_the_errors(name):
    assert own_imports(name) <= {"oprd.foundation.errors"}


def test_only_the_trainer_imports_trl():
    importers = {name for name in MODULES if any(is_within(n, "trl") for n in imported_names(name))}
    assert {name for name in importers if not name.startswith("oprd.training.trainer")} == set()


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
