"""What is told about a distilled model, and what is sent to the Hub."""

from concurrent.futures import Future
from pathlib import Path

import pytest
from huggingface_hub import HfApi, ModelCard, RepoUrl
from huggingface_hub.utils import filter_repo_objects

from oprd.folders import card
from oprd.training.train import train
from run_folders import lasting, same_weights

CARD = """---
license: apache-2.0
---
# A student
"""


@pytest.fixture
def hub(monkeypatch):
    """A Hub that takes everything: which repository was sent which files, by commit message."""
    uploads = {}

    def upload(self, *, repo_id, folder_path, commit_message, ignore_patterns=None, **_):
        files = [str(p.relative_to(folder_path)) for p in Path(folder_path).rglob("*") if p.is_file()]
        kept = filter_repo_objects(files, ignore_patterns=ignore_patterns)
        uploads[commit_message] = repo_id, set(kept), (Path(folder_path) / "README.md").exists()
        done = Future()
        done.set_result(None)
        return done

    monkeypatch.setattr(HfApi, "whoami", lambda *_, **__: {"name": "me"})
    monkeypatch.setattr(
        HfApi, "create_repo", lambda self, name, **_: RepoUrl(f"https://huggingface.co/{name}")
    )
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    return uploads


@pytest.mark.parametrize("adapters", [[], ["--use_peft", "true", "--lora_r", "2"]], ids=["whole", "lora"])
def test_checkpoints_and_the_finished_run_are_sent_to_the_hub(hub, recipe, tmp_path, prompts, adapters):
    folder = tmp_path / "run"
    train(*recipe(folder, "--push_to_hub", "true", "--hub_model_id", "me/distilled", *adapters))
    assert [f"Training in progress, step {n}" in hub for n in (1, 2, 3, 4)] == [True] * 4
    repo, files, _ = hub["Model save"]
    assert repo == "me/distilled"
    weights = {"adapter_model.safetensors", "merged/model.safetensors"} if adapters else {"model.safetensors"}
    assert weights | {"README.md", "tokenizer.json", "resolved.yaml", "metrics.jsonl"} <= files
    assert not {name for name in files if name.startswith("checkpoint-") or name.endswith(".lock")}
    assert f"`{prompts}`" in (folder / "README.md").read_text()  # the card of the last push names all


def test_a_run_that_pushes_checkpoints_goes_on_after_a_stop(hub, recipe, tmp_path):
    """A push copies the checkpoint's weights beside the run's files, where they are no finished model."""
    flags = "--push_to_hub", "true", "--hub_model_id", "me/distilled"
    train(*recipe(tmp_path / "whole", *flags))
    train(*recipe(tmp_path / "halves", *flags, "--max_steps", "2"))
    train(*recipe(tmp_path / "halves", *flags))
    assert lasting(tmp_path / "halves") == lasting(tmp_path / "whole")
    assert same_weights(tmp_path / "halves", tmp_path / "whole")


def test_a_card_has_what_the_hub_reads(recipe, tmp_path, student):
    (Path(student) / "README.md").write_text(CARD)
    card.license_of.cache_clear()
    flags = ["--accuracy_dataset_name", "tiny", "--accuracy_problems", "2", "--accuracy_samples", "2"]
    train(*recipe(tmp_path / "run", *flags))
    (Path(student) / "README.md").unlink()
    found = ModelCard.load(tmp_path / "run" / "README.md")
    header = found.data
    assert header.license == "apache-2.0" and header.pipeline_tag == "text-generation"
    assert header.library_name == "transformers" and "on-policy-distillation" in header.tags
    assert header.base_model is None and header.datasets is None  # folders of this machine
    (result,) = header.eval_results
    assert result.dataset_type == "tiny" and 0 <= result.metric_value <= 1
    assert "| 4 | " in found.text and "Yang, Shenzhi" in found.text


@pytest.mark.parametrize(
    ("name", "is_named"),
    [
        ("Qwen/Qwen3-1.7B", True),
        ("tiny:student", False),
        ("./student", False),
        ("a/b/c", False),
        ("student", False),
    ],
)
def test_only_names_of_the_hub_stand_in_the_header(tmp_path, name, is_named):
    settings = dict.fromkeys(card.KEYS) | {"representation_weight": "1", "output_loss": "none"}
    (tmp_path / "README.md").write_text(card.model_card(tmp_path, name, "teacher", name, settings))
    header = ModelCard.load(tmp_path / "README.md").data
    assert header.base_model == (name if is_named else None)
    assert header.datasets == ([name] if is_named else None)
