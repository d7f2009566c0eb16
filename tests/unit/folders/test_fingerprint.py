"""Fingerprints of what a run is made from: equal for equal content, whatever its name."""

import json
import shutil

import pytest
from datasets import Dataset
from safetensors.torch import load_file, save_file

from oprd.folders import fingerprint
from oprd.folders.fingerprint import file_fingerprint, model_fingerprints, rows_fingerprint
from oprd.foundation.errors import UserError
from oprd.models.loading import TINY_MODELS


@pytest.fixture
def model(tmp_path):
    return shutil.copytree(TINY_MODELS / "student", tmp_path / "model")


def parts_changed(model, change):
    before = model_fingerprints(str(model))
    change()
    after = model_fingerprints(str(model))
    return {part for part in before if before[part] != after[part]}


def test_a_bundled_model_and_its_copy_are_the_same(model):
    assert model_fingerprints("tiny:student") == model_fingerprints(str(model))
    assert model_fingerprints("tiny:teacher") != model_fingerprints(str(model))


def test_one_changed_weight(model):
    weights = load_file(model / "model.safetensors")
    name = sorted(weights)[-1]
    weights[name].view(-1)[-1] += 1
    assert parts_changed(model, lambda: save_file(weights, model / "model.safetensors")) == {"weights"}


def test_zeroed_bytes_of_the_same_size(model):
    file = model / "model.safetensors"
    content = file.read_bytes()
    assert parts_changed(model, lambda: file.write_bytes(content[:-99] + bytes(99))) == {"weights"}


def test_a_key_of_the_config(model):
    config = json.loads((model / "config.json").read_text())

    def write(**changes):
        (model / "config.json").write_text(json.dumps(config | changes))

    assert parts_changed(model, lambda: write(rms_norm_eps=0.5)) == {"weights"}
    write()
    assert parts_changed(model, lambda: write(transformers_version="9.9.9")) == set()


def test_the_chat_template(model):
    assert parts_changed(model, lambda: (model / "chat_template.jinja").write_text("hi")) == {"tokenizer"}


def test_what_lies_beside_a_model_does_not_count(model):
    def add():
        (model / "README.md").write_text("a card")
        (model / "checkpoint-3").mkdir()
        (model / "checkpoint-3" / "model.safetensors").write_bytes(b"1")
        (model / "training_args.bin").write_bytes(b"1")

    assert parts_changed(model, add) == set()


def test_adapters_stand_on_their_model(model, tmp_path):
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    (adapters / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(model)}))
    (adapters / "adapter_model.safetensors").write_bytes(b"adapters")
    weights = model / "model.safetensors"
    content = weights.read_bytes()
    assert parts_changed(adapters, lambda: weights.write_bytes(content[:-1] + b"!")) == {"weights"}


def test_no_model(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        model_fingerprints(str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("rows", "same"),
    [
        ([{"prompt": "a"}, {"prompt": "b"}], True),
        ([{"prompt": "b"}, {"prompt": "a"}], False),
        ([{"prompt": "a"}], False),
        ([{"prompt": "a"}, {"prompt": "B"}], False),
        ([{"prompt": "a", "solution": "1"}, {"prompt": "b", "solution": "2"}], False),
    ],
)
def test_rows(rows, same):
    first = rows_fingerprint(Dataset.from_list([{"prompt": "a"}, {"prompt": "b"}]))
    assert (rows_fingerprint(Dataset.from_list(rows)) == first) == same


def test_rows_of_messages():
    def of(text):
        return rows_fingerprint(Dataset.from_list([{"prompt": [{"role": "user", "content": text}]}] * 1001))

    assert of("a") == of("a") != of("é")


def test_large_files_are_sampled(tmp_path, monkeypatch):
    """A tensor of two strides is hit, wherever it lies; a file that is longer by a byte differs."""
    monkeypatch.setattr(fingerprint, "WHOLE_BYTES", 10)
    file = tmp_path / "large"
    size = 4096 * 1000
    content = bytearray(size)
    file.write_bytes(content)
    first = file_fingerprint(file)
    for start in (0, 1_234_567, size - 2000):
        changed = content.copy()
        changed[start : start + 2000] = b"\1" * 2000
        file.write_bytes(changed)
        assert file_fingerprint(file) != first
    file.write_bytes(content + b"\0")
    assert file_fingerprint(file) != first
