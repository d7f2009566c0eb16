"""The model card of a distilled student: what it is, from whom it learnt, with which settings and results."""

import importlib.metadata
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, constants, model_info
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from oprd.folders.recorder import METRICS_FILE, read_metrics
from oprd.objective.composite import Schedule
from oprd.objective.settings import ObjectiveSettings

PACKAGES = ("oprd", "trl", "transformers", "torch")
KEYS = (*ObjectiveSettings.__dataclass_fields__, "max_steps", "learning_rate", "temperature")

CARD = """---
{header}
---

# {name}

`{student}`, distilled from the teacher `{teacher}`{dataset} by **{method}**: the student sampled its own
rollouts, and the frozen teacher read the same text. Method: [arXiv 2606.06021](https://arxiv.org/abs/2606.06021).

```python
from transformers import pipeline

generator = pipeline("text-generation", model="{folder}")
messages = [{{"role": "user", "content": "…"}}]
print(generator(messages, return_full_text=False)[0]["generated_text"])
```
{results}
## Settings

```yaml
{settings}```

## Versions

{versions}

## Citation

```bibtex
@article{{yang2026oprd,
  title   = {{OPRD: On-Policy Representation Distillation}},
  author  = {{Yang, Shenzhi and Zhu, Guangcheng and Song, Bowen and Wang, Haobo and Xia, Mingxuan and
             Zheng, Xing and Ma, Yingfan and Chen, Zhongqi and Wang, Weiqiang and Chen, Gang}},
  journal = {{arXiv preprint arXiv:2606.06021}},
  year    = {{2026}},
}}
```
"""

RESULTS = """
## Results

Accuracy on `{dataset}` while it was trained, with 95 % intervals:

| step | accuracy |
|---|---|
{rows}
"""


def model_card(
    folder: Path, student: str, teacher: str, dataset: str | None, settings: Mapping[str, Any]
) -> str:
    """The text of `README.md` for the model in `folder`; `settings` are those of the run.

    If the run measured accuracy, the card tells the first one and the model's, which is the last or the best.
    Its header has the model's, as the Hub lists results.
    """
    dataset = dataset or settings.get("dataset_name")
    graded, records = settings.get("accuracy_dataset_name"), read_metrics(folder / METRICS_FILE)
    measured = [record for record in records if "eval/avg_at_k" in record] if graded else []
    if measured and settings.get("load_best"):
        best = max(measured, key=lambda record: record["eval/avg_at_k"])  # the first of equals
        measured = measured[: measured.index(best) + 1]
    return CARD.format(
        header=_header(folder, student, dataset, graded, measured),
        name=folder.name,
        student=student,
        teacher=teacher,
        dataset=f" on the prompts of `{dataset}`" if dataset else "",
        method=_method(settings),
        folder=folder,
        results=_results(graded, measured),
        settings=yaml.safe_dump({key: settings[key] for key in KEYS}, sort_keys=False, allow_unicode=True),
        versions="\n".join(f"- {name} {importlib.metadata.version(name)}" for name in PACKAGES),
    )


def _header(
    folder: Path,
    student: str,
    dataset: str | None,
    graded: str | None,
    measured: Sequence[Mapping[str, float]],
) -> str:
    """The metadata that the Hub reads; names that are not of the Hub are left out."""
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=str(graded),
            dataset_name=Path(str(graded)).name,
            metric_type="accuracy",
            metric_value=round(record["eval/avg_at_k"], 4),
        )
        for record in measured[-1:]
    ]
    return ModelCardData(
        base_model=student if _is_on_hub(student) else None,
        datasets=[dataset] if dataset and _is_on_hub(dataset) else None,
        license=license_of(student),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["oprd", "trl", "distillation", "on-policy-distillation"],
        model_name=folder.name if results else None,
        eval_results=results or None,
    ).to_yaml()


def _results(graded: str | None, measured: Sequence[Mapping[str, float]]) -> str:
    if not measured:
        return ""
    first_and_last = {record["step"]: record for record in (measured[0], measured[-1])}
    rows = [
        "| {:.0f} | {:.1%} ({:.1%}–{:.1%}) |".format(
            step, *(record[f"eval/{name}"] for name in ("avg_at_k", "ci95_low", "ci95_high"))
        )
        for step, record in first_and_last.items()
    ]
    return RESULTS.format(dataset=graded, rows="\n".join(rows))


def _is_on_hub(name: str) -> bool:
    """Whether a name has the form of the Hub's, and no folder has it."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not Path(name).exists()


@cache
def license_of(model: str) -> str | None:
    """The licence that the card of a folder or of a model of the Hub names; None where none can be read.

    A student that was trained further stays under the licence of what it was.
    """
    card = Path(model).expanduser() / "README.md"
    try:
        if card.is_file():
            return ModelCard.load(card, ignore_metadata_errors=True).data.license
        if _is_on_hub(model) and not constants.HF_HUB_OFFLINE:
            about = model_info(model, timeout=5).card_data
            return about.license if about else None
    except Exception:  # without a network, a login or a readable card the run still has its own card
        return None
    return None


def _method(settings: Mapping[str, Any]) -> str:
    """The terms of the objective in words."""
    parts = []
    if Schedule.parse(settings["representation_weight"]).ever_active:
        parts.append("on-policy representation distillation (OPRD)")
    if settings["output_loss"] != "none":
        parts.append(f"on-policy distillation in output space ({settings['output_loss']})")
    return " and ".join(parts)
