"""Where the project's own files are, for tests in any folder."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
SUPPORT = Path(__file__).parent
BENCHMARKS, RECIPES, TINY_RECIPES = ROOT / "benchmarks", ROOT / "recipes", ROOT / "recipes" / "tiny"
