"""Accuracy during a run, of models with few positions."""

import json

import pytest
import yaml

from oprd.folders.recorder import read_metrics
from oprd.foundation.errors import UserError
from oprd.models.loading import load_tokenizer
from oprd.training.train import parse_training_recipe, train
from tiny_pair import QUICK


@pytest.fixture
def start(tmp_path, make_folder):
    """`start(positions, question)`: a step of a run whose accuracy is measured on one question."""

    def run(positions, question):
        (tmp_path / "prompts.jsonl").write_text('{"prompt": "1?"}\n' * 4)
        (tmp_path / "test.jsonl").write_text(json.dumps({"prompt": question, "solution": "7"}) + "\n")
        names = {
            "model_name_or_path": make_folder(1, max_position_embeddings=positions),
            "teacher_model_name_or_path": make_folder(2, max_position_embeddings=positions),
            "dataset_name": str(tmp_path / "prompts.jsonl"),
            "accuracy_dataset_name": str(tmp_path / "test.jsonl"),
            "output_dir": str(tmp_path / "run"),
        }
        counts = {"accuracy_steps": 1, "accuracy_samples": 2, "max_steps": 1}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(QUICK | names | counts))
        return train(*parse_training_recipe(tmp_path / "recipe.yaml"))

    return run


QUESTION = "What is 3 plus 4? " * 2


def test_a_response_ends_where_the_positions_do(start, student):
    prompt = len(load_tokenizer(student)(QUESTION)["input_ids"])
    (record,) = read_metrics(start(prompt + 3, QUESTION) / "metrics.jsonl")
    assert 1 <= record["eval/mean_length"] <= 3


def test_a_prompt_that_leaves_no_position_is_refused(start, tmp_path):
    with pytest.raises(
        UserError, match=r"a prompt of accuracy_dataset_name: .*test\.jsonl fills the context"
    ):
        start(24, QUESTION * 4)
    assert not (tmp_path / "run").exists()
