"""The model card of a distilled student: what it is, from whom it learnt, with which settings."""

import importlib.metadata
from pathlib import Path
from typing import Any

import yaml

from oprd.objective.composite import Schedule

PACKAGES = ("oprd", "trl", "transformers", "torch")

CARD = """---
{header}---

# {name}

`{student}`, distilled from the teacher `{teacher}`{dataset} by **{method}**: the student sampled its own
rollouts, and the frozen teacher read the same text. Method: [arXiv 2606.06021](https://arxiv.org/abs/2606.06021).

```python
from transformers import pipeline

generator = pipeline("text-generation", model="{folder}")
messages = [{{"role": "user", "content": "…"}}]
print(generator(messages, return_full_text=False)[0]["generated_text"])
```

## Settings

```yaml
{settings}```

## Versions

{versions}

## Citation

```bibtex
@article{{oprd2026,
  title  = {{On-Policy Representation Distillation}},
  year   = 2026,
  eprint = {{arXiv:2606.06021}},
}}
```
"""


def model_card(
    folder: Path, student: str, teacher: str, dataset: str | None, settings: dict[str, Any]
) -> str:
    """The text of `README.md` for the model in `folder`; `settings` are those of the run."""
    header: dict[str, Any] = {"library_name": "transformers", "tags": ["oprd", "trl", "distillation"]}
    if "/" in student and not Path(student).expanduser().exists():
        header["base_model"] = student
    return CARD.format(
        header=yaml.safe_dump(header, sort_keys=False),
        name=folder.name,
        student=student,
        teacher=teacher,
        dataset=f" on the prompts of `{dataset}`" if dataset else "",
        method=_method(settings),
        folder=folder,
        settings=yaml.safe_dump(settings, sort_keys=False, allow_unicode=True),
        versions="\n".join(f"- {name} {importlib.metadata.version(name)}" for name in PACKAGES),
    )


def _method(settings: dict[str, Any]) -> str:
    """The terms of the objective in words."""
    parts = []
    if Schedule.parse(settings["representation_weight"]).ever_active:
        parts.append("on-policy representation distillation (OPRD)")
    if settings["output_loss"] != "none":
        parts.append(f"on-policy distillation in output space ({settings['output_loss']})")
    return " and ".join(parts)
