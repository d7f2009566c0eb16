"""Runs that are told to stop by a signal: what they finish, keep, say, and go on from."""

import json
import os
import signal

import pytest
import yaml

from oprd.cli import commands as cli
from oprd.folders.checkpoints import checkpoints, last_whole_checkpoint
from oprd.folders.claims import is_finished
from oprd.folders.recorder import read_metrics
from oprd.foundation.signals import SIGNALS
from oprd.training.trainer import OPRDTrainer
from tiny_pair import QUICK, prompt_texts


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, student, teacher):
    folder = tmp_path_factory.mktemp("recipe")
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in prompt_texts(12)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = {
        "model_name_or_path": student,
        "teacher_model_name_or_path": teacher,
        "dataset_name": str(folder / "prompts.jsonl"),
        "max_steps": 4,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(QUICK | names))
    return str(folder / "recipe.yaml")


@pytest.fixture
def signalled(monkeypatch):
    """`signalled(step, *numbers)`: these signals come in the middle of a step."""

    def arrange(step, *numbers):
        update = OPRDTrainer.training_step
        waiting = list(numbers)

        def training_step(self, *args, **kwargs):
            if self.state.global_step == step - 1:
                while waiting:
                    os.kill(os.getpid(), waiting.pop(0))
            return update(self, *args, **kwargs)

        monkeypatch.setattr(OPRDTrainer, "training_step", training_step)

    return arrange


@pytest.fixture
def oprd(capfd):
    """`oprd(*argv)`: the exit code and the lines of stderr."""

    def run(*argv):
        code = cli.run(argv)
        return code, capfd.readouterr().err.strip().splitlines()

    return run


def steps(folder):
    return [record["step"] for record in read_metrics(folder / "metrics.jsonl")]


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: signal.Signals(number).name)
def test_a_signal_ends_the_run_after_its_step(oprd, recipe, tmp_path, signalled, number):
    argv = ["train", recipe, "--output_dir", str(tmp_path / "run")]
    before = [signal.getsignal(one) for one in SIGNALS]
    signalled(2, number)
    code, said = oprd(*argv)
    assert code == 128 + number
    name = signal.Signals(number).name
    assert f"oprd: {name}: stopping after step 2; again to leave at once" in said
    assert said[-1] == f"oprd: stopped with {tmp_path}/run/checkpoint-2: the same command goes on from step 3"
    assert [signal.getsignal(one) for one in SIGNALS] == before
    assert steps(tmp_path / "run") == [1, 2] and not is_finished(tmp_path / "run", 0)
    assert last_whole_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-2"
    if number == signal.SIGTERM:
        assert oprd(*argv)[0] == 0
        assert oprd(*argv[:-1], str(tmp_path / "whole"))[0] == 0
        assert steps(tmp_path / "run") == [1, 2, 3, 4]
        assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_a_second_signal_leaves_at_once(oprd, recipe, tmp_path, signalled):
    argv = ["train", recipe, "--output_dir", str(tmp_path)]
    signalled(2, signal.SIGINT, signal.SIGINT)
    code, said = oprd(*argv)
    assert code == 130
    assert (
        said[-1]
        == f"oprd: stopped after step 1, without a checkpoint of {tmp_path}: the same command starts over"
    )
    assert checkpoints(tmp_path) == [] and steps(tmp_path) == [1]


def test_what_a_run_that_starts_over_left_is_kept(oprd, recipe, tmp_path, signalled, caplog):
    argv = ["train", recipe, "--output_dir", str(tmp_path)]
    signalled(3, signal.SIGTERM, signal.SIGTERM)
    assert oprd(*argv)[0] == 143
    lost = (tmp_path / "metrics.jsonl").read_text()
    assert oprd(*argv)[0] == 0
    told = f"{tmp_path} starts over, without a whole checkpoint: what its 2 steps left is kept"
    assert f"{told} in {tmp_path}/earlier-1" in caplog.messages
    assert (tmp_path / "earlier-1" / "metrics.jsonl").read_text() == lost
    assert steps(tmp_path) == [1, 2, 3, 4]


def test_a_second_signal_goes_on_from_the_last_checkpoint(oprd, recipe, tmp_path, signalled):
    argv = ["train", recipe, "--output_dir", str(tmp_path), "--save_strategy", "steps", "--save_steps", "2"]
    signalled(4, signal.SIGINT, signal.SIGTERM)
    code, said = oprd(*argv)
    assert code == 143 and said[-1].endswith("checkpoint-2: the same command goes on from step 3")


def test_a_signal_in_the_first_step(oprd, recipe, tmp_path, signalled):
    argv = ["train", recipe, "--output_dir", str(tmp_path)]
    signalled(1, signal.SIGTERM, signal.SIGTERM)
    code, said = oprd(*argv)
    assert (
        code == 143
        and said[-1] == f"oprd: stopped before the end of step 1 of {tmp_path}: the same command starts over"
    )
    assert oprd(*argv, "--learning_rate", "0.5", "--max_steps", "1")[0] == 0  # nothing was trained so far


def test_a_signal_in_the_last_step_does_not_keep_the_run_from_its_end(oprd, recipe, tmp_path, signalled):
    signalled(4, signal.SIGTERM)
    code, _ = oprd("train", recipe, "--output_dir", str(tmp_path))
    assert code == 0 and is_finished(tmp_path, 4)


def test_a_signal_while_models_load(oprd, recipe, tmp_path, monkeypatch):
    def load(*_):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(OPRDTrainer, "_load_teacher", load)
    code, said = oprd("train", recipe, "--output_dir", str(tmp_path / "run"))
    assert code == 143
    assert said[-1] == "oprd: stopped before anything was written: the same command starts over"
    assert not (tmp_path / "run").exists()


def test_launchers_hand_a_signal_on_that_was_heard_already(oprd, recipe, tmp_path, signalled, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    signalled(2, signal.SIGINT, signal.SIGINT)
    code, said = oprd("train", recipe, "--output_dir", str(tmp_path))
    assert code == 130 and said[-1].endswith("goes on from step 3")
