import copy
import itertools
import json
import multiprocessing
import shutil
from dataclasses import asdict

import pytest
import torch

from oprd.cli import commands as cli
from oprd.evaluation import evaluate as evaluation
from oprd.evaluation.evaluate import evaluate, evaluation_folder, graded
from oprd.evaluation.grade import grade
from oprd.evaluation.metrics import confidence_interval
from oprd.evaluation.problems import EvalSettings
from oprd.folders.lock import LOCK_FILE, Holder
from oprd.foundation.errors import UserError
from oprd.models.tiny import task
from oprd.models.tiny.tokenizer import train_tokenizer
from oprd.rollouts import generation as rollouts
from oprd.rollouts.generation import Rollout, Sampling
from tiny_qwen import tiny_qwen

torch.set_num_threads(1)
DRAWN = Sampling(max_new_tokens=6, temperature=1.0, top_p=1.0)
SETTINGS = EvalSettings(samples=3, sampling=DRAWN, batch_size=7)  # groups of two problems, the last of one
ROWS = task.rows("eval", 5)


@pytest.fixture(scope="module")
def tokenizer():
    problems = itertools.islice(task.problems("train", 0), 30)
    return train_tokenizer(task.question(p)[0]["content"] + task.solution(p) for p in problems)


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_qwen(tokenizer, max_position_embeddings=64)


@pytest.fixture(scope="module")
def finished(model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval") / "whole"
    evaluate(model, tokenizer, ROWS, SETTINGS, folder, "random", progress=False)
    return folder


def records(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def never(*args, **kwargs):
    raise AssertionError("generated again")


def test_one_line_per_problem(finished, tokenizer):
    lines = records(finished)
    assert [line["problem"] for line in lines] == [0, 1, 2, 3, 4]
    for line, row in zip(lines, ROWS, strict=True):
        assert line["prompt"] == row["prompt"] and line["reference"] == row["solution"]
        assert len({sample["text"] for sample in line["samples"]}) == 3
        for sample in line["samples"]:
            assert set(sample) == {"text", "answer", "correct", "length", "truncated"}
            assert sample["length"] == 6 or not sample["truncated"]


def test_the_end_of_a_response_is_no_part_of_its_text(tokenizer):
    """Whether the token is special or not."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(["<|eot|>"])
    ids = tokenizer("Answer: 3<|eot|>")["input_ids"]
    sample = graded(tokenizer, Rollout([1], ids, truncated=False), "3")
    assert sample["text"] == "Answer: 3" and sample["correct"] and sample["length"] == len(ids)


def test_summary_describes_the_run(finished, model, tokenizer):
    summary = json.loads((finished / "summary.json").read_text())
    lines = records(finished)
    lengths = [sample["length"] for line in lines for sample in line["samples"]]
    truncated = [sample["truncated"] for line in lines for sample in line["samples"]]
    assert summary["num_problems"] == 5 and summary["samples"] == 3
    assert summary["avg_at_k"] == 0.0 and summary["ci95"] == list(confidence_interval([0.0] * 5))
    assert summary["pass_at_k"] == {"1": 0.0, "2": 0.0}
    assert summary["mean_length"] == pytest.approx(sum(lengths) / 15)
    assert summary["truncated_share"] == pytest.approx(sum(truncated) / 15)
    assert summary["no_answer_share"] == 1.0
    assert summary["settings"] == json.loads((finished / "settings.json").read_text())
    assert summary["settings"]["temperature"] == 1.0 and summary["settings"]["model_name"] == "random"
    assert evaluate(model, tokenizer, ROWS, SETTINGS, None, "random", progress=False) == summary


def test_right_answers_are_counted(model, tokenizer, tmp_path, monkeypatch):
    """Accuracies by hand, with a decoder that answers the first problem on its even samples alone."""
    calls = itertools.count()

    def answer(ids, **kwargs):
        call = next(calls)
        return rf"\boxed{{{ROWS[0]['solution']}}}" if call < 3 and call % 2 == 0 else r"\boxed{1000}"

    monkeypatch.setattr(tokenizer, "decode", answer)
    summary = evaluate(model, tokenizer, ROWS, SETTINGS, tmp_path, progress=False)
    assert grade(answer(None), "1000")
    assert summary["avg_at_k"] == pytest.approx(2 / 15)
    assert summary["best_at_k"] == summary["majority_at_k"] == pytest.approx(1 / 5)
    assert summary["pass_at_k"] == {"1": pytest.approx(2 / 15), "2": pytest.approx(1 / 5)}
    assert [s["correct"] for s in records(tmp_path)[0]["samples"]] == [True, False, True]


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.25, 0.5, 0.7, 0.99, 1.0])
def test_a_killed_run_resumes_to_the_same_bytes(finished, model, tokenizer, tmp_path, kept):
    whole = (finished / "samples.jsonl").read_bytes()
    (tmp_path / "settings.json").write_bytes((finished / "settings.json").read_bytes())
    (tmp_path / "samples.jsonl").write_bytes(whole[: int(kept * len(whole))])
    torch.rand(3)
    evaluate(model, tokenizer, ROWS, SETTINGS, tmp_path, "random", progress=False)
    assert (tmp_path / "samples.jsonl").read_bytes() == whole
    assert (tmp_path / "summary.json").read_bytes() == (finished / "summary.json").read_bytes()


def test_resuming_generates_only_what_is_missing(finished, model, tokenizer, tmp_path, monkeypatch):
    lines = (finished / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "settings.json").write_bytes((finished / "settings.json").read_bytes())
    (tmp_path / "samples.jsonl").write_bytes(b"".join(lines[:3]))
    batches, generate = [], rollouts.generate
    monkeypatch.setattr(rollouts, "generate", lambda *a: batches.append(len(a[2])) or generate(*a))
    evaluate(model, tokenizer, ROWS, SETTINGS, tmp_path, "random", progress=False)
    assert batches == [6, 3]


def test_a_finished_folder_is_not_touched(finished, model, tokenizer, monkeypatch):
    monkeypatch.setattr(rollouts, "generate", never)
    summary = evaluate(model, tokenizer, ROWS, SETTINGS, finished, "random", progress=False)
    assert summary == json.loads((finished / "summary.json").read_text())


def test_groups_larger_than_a_batch_are_split(model, tokenizer, monkeypatch):
    seeds, generate = [], rollouts.generate
    monkeypatch.setattr(rollouts, "generate", lambda *a: seeds.append((len(a[2]), a[4])) or generate(*a))
    settings = EvalSettings(samples=5, sampling=DRAWN, batch_size=2)
    summary = evaluate(model, tokenizer, ROWS[:2], settings, progress=False)
    assert [count for count, _ in seeds] == [2, 2, 1, 2, 2, 1]
    assert len({seed for _, seed in seeds}) == 6
    assert list(summary["pass_at_k"]) == ["1", "2", "4"]


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"settings": EvalSettings(samples=3, sampling=DRAWN, batch_size=7, seed=1)}, "seed"),
        ({"settings": EvalSettings(samples=3, sampling=Sampling(6, 0.5, 1.0), batch_size=7)}, "temperature"),
        (
            {"settings": EvalSettings(samples=3, sampling=DRAWN, batch_size=7, prompt_suffix="!")},
            "prompt_suffix",
        ),
        ({"rows": ROWS[:4]}, "num_problems"),
        ({"rows": [*ROWS[:4], {**ROWS[4], "solution": "1"}]}, "data_fingerprint"),
        ({"model_name": "other"}, "model_name"),
    ],
)
def test_a_folder_of_another_evaluation_is_refused(finished, model, tokenizer, change, key):
    call = {"rows": ROWS, "settings": SETTINGS, "model_name": "random", **change}
    with pytest.raises(UserError, match=f"another {key} "):
        evaluate(model, tokenizer, output_dir=finished, progress=False, **call)


def test_a_folder_of_another_model_is_refused(finished, model, tokenizer):
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.lm_head.weight += 1e-3
    with pytest.raises(UserError, match="another model_fingerprint "):
        evaluate(changed, tokenizer, ROWS, SETTINGS, finished, "random", progress=False)


@pytest.mark.parametrize("name", ["samples.jsonl", "summary.json"])
def test_results_of_unknown_origin_are_refused(model, tokenizer, tmp_path, name):
    (tmp_path / name).write_text("{}\n")
    with pytest.raises(UserError, match=rf"holds {name} but no settings\.json"):
        evaluate(model, tokenizer, ROWS, SETTINGS, tmp_path, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "is damaged"),
        ("{", "is damaged"),
        ("\x00" * 9, "is damaged"),
        ("[" * 10**5, "is damaged"),
        ("[]", "is not of an evaluation"),
        ('{"pair": "same", "steps": 2}', "is not of an evaluation"),
    ],
    ids=range(6),
)
def test_settings_that_cannot_be_read_are_refused_before_models_load(tmp_path, content, told):
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(UserError, match=rf"settings\.json {told}"), evaluation_folder(tmp_path):
        pass
    argv = ["eval", "--model", "nowhere", "--data", "tiny", "--output", str(tmp_path)]
    assert cli.run(argv) == 2


def edited(line, **changes):
    return json.dumps(json.loads(line) | changes).encode() + b"\n"


# What stands in a file of five lines, and the problems that are then drawn again, in groups of two.
ATTACKS = {
    "blank": (lambda a: [a[0], b"\n", *a[1:]], []),
    "alien": (lambda a: [*a[:2], b'{"step": 3}\n', *a[3:]], [2, 3]),
    "no JSON": (lambda a: [*a[:4], b"{[\n"], [4]),
    "bytes": (lambda a: [b"\xff\x00\n", *a[1:]], [0, 1]),
    "deep": (lambda a: [b"[" * 10**5 + b"\n", *a[1:]], [0, 1]),
    "twice": (lambda a: [a[0], a[1], a[0], a[1], *a[2:]], []),
    "another order": (lambda a: a[::-1], []),
    "one missing": (lambda a: [a[0], *a[2:]], [0, 1]),
    "a number that is none": (lambda a: [edited(a[0], problem=True), *a[1:]], [0, 1]),
    "a number too large": (lambda a: [*a[:4], edited(a[4], problem=5)], [4]),
    "another reference": (lambda a: [*a[:4], edited(a[4], reference="7")], [4]),
    "another prompt": (lambda a: [*a[:4], edited(a[4], prompt="What is 1?")], [4]),
    "too few samples": (lambda a: [*a[:4], edited(a[4], samples=[])], [4]),
    "samples that are none": (lambda a: [*a[:4], edited(a[4], samples=[1, 2, 3])], [4]),
    "a sample without its mark": (lambda a: [*a[:4], a[4].replace(b'"correct": false, ', b"", 1)], [4]),
    "a mark that is none": (lambda a: [*a[:4], a[4].replace(b"false", b'"no"', 1)], [4]),
    "half of a pair": (lambda a: [*a[:4], a[4].replace(b'"text": "', b'"text": "\\ud800', 1)], [4]),
    "no line's end": (lambda a: [*a[:4], a[4][:-1]], [4]),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_lines_that_are_not_of_this_evaluation_are_drawn_again(
    finished, model, tokenizer, tmp_path, monkeypatch, caplog, attack
):
    """To the bytes of an evaluation that nobody touched; and only what is missing is drawn."""
    change, missing = ATTACKS[attack]
    lines = (finished / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "settings.json").write_bytes((finished / "settings.json").read_bytes())
    (tmp_path / "samples.jsonl").write_bytes(b"".join(change(lines)))
    batches, generate = [], rollouts.generate
    monkeypatch.setattr(rollouts, "generate", lambda *a: batches.append(len(a[2])) or generate(*a))
    evaluate(model, tokenizer, ROWS, SETTINGS, tmp_path, "random", progress=False)
    for name in ("samples.jsonl", "summary.json"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()
    assert sum(batches) == 3 * len(missing)
    silent = ("another order", "one missing", "no line's end")
    assert ("are dropped, and what is then missing is drawn again" in caplog.text) == (attack not in silent)


@pytest.mark.parametrize(
    "damage",
    [
        *("", "{", "[]", "{}", '{"settings": {}}'),
        *({"avg_at_k": None}, {"avg_at_k": "0.5"}, {"ci95": [0.1]}, {"pass_at_k": {}}, {"samples": 3.0}),
        {"another_key": 1},
    ],
    ids=str,
)
def test_a_damaged_summary_is_made_again_from_the_samples(
    finished, model, tokenizer, tmp_path, monkeypatch, caplog, damage
):
    folder = shutil.copytree(finished, tmp_path / "copied")
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(damage if isinstance(damage, str) else json.dumps(summary | damage))
    monkeypatch.setattr(rollouts, "generate", never)
    evaluate(model, tokenizer, ROWS, SETTINGS, folder, "random", progress=False)
    assert (folder / "summary.json").read_bytes() == (finished / "summary.json").read_bytes()
    assert caplog.text.count("summary.json is damaged: it is made again") == 1


def test_a_line_that_another_program_takes_away_is_missed(model, tokenizer, tmp_path, monkeypatch):
    """The lock keeps other evaluations out, not an editor."""
    written = evaluation.line
    calls = itertools.count()

    def meddle(record):
        if next(calls) == 4:
            (tmp_path / "samples.jsonl").write_bytes(b"")
        return written(record)

    monkeypatch.setattr(evaluation, "line", meddle)
    with pytest.raises(RuntimeError, match=r"samples\.jsonl lacks 4 problems, which another program"):
        evaluate(model, tokenizer, ROWS, SETTINGS, tmp_path, progress=False)
    assert not (tmp_path / "summary.json").exists()


def test_an_evaluation_in_use_is_refused(finished, model, tokenizer, tmp_path):
    with multiprocessing.get_context("fork").Pool(1) as pool:
        other = pool.apply(Holder.this_process, ("oprd eval", tmp_path))
        (tmp_path / LOCK_FILE).write_text(json.dumps(asdict(other)))
        told = rf"is in use by oprd eval \(process {other.pid} on "
        with pytest.raises(UserError, match=told):
            evaluate(model, tokenizer, ROWS, SETTINGS, tmp_path, "random", progress=False)
        with pytest.raises(UserError, match=told), evaluation_folder(tmp_path):
            pass
    assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]
    with evaluation_folder(tmp_path):
        evaluate(model, tokenizer, ROWS, SETTINGS, tmp_path, "random", progress=False)
    assert (tmp_path / "samples.jsonl").read_bytes() == (finished / "samples.jsonl").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"settings.json", "samples.jsonl", "summary.json"}


def test_greedy_samples_are_equal_and_random_state_is_left_alone(model, tokenizer, tmp_path):
    before = torch.get_rng_state()
    greedy = EvalSettings(samples=3, sampling=Sampling(6, temperature=0), batch_size=6)
    evaluate(model, tokenizer, ROWS, greedy, tmp_path, progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(len({s["text"] for s in line["samples"]}) == 1 for line in records(tmp_path))


def test_the_suffix_goes_to_the_last_user_message(model, tokenizer, tmp_path):
    chat = [*ROWS[0]["prompt"], {"role": "assistant", "content": "1"}]
    rows = [{"prompt": chat, "solution": "1"}, {"prompt": "1+1=", "solution": 2}]
    settings = EvalSettings(samples=1, sampling=DRAWN, prompt_suffix=" Box it.")
    evaluate(model, tokenizer, rows, settings, tmp_path, progress=False)
    first, second = records(tmp_path)
    assert first["prompt"] == [{**chat[0], "content": chat[0]["content"] + " Box it."}, chat[1]]
    assert second["prompt"] == "1+1= Box it." and second["reference"] == "2"
    assert chat[0]["content"].endswith(".") and not chat[0]["content"].endswith("Box it.")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "empty"),
        ([ROWS[0], {"prompt": "1+1"}], "row 1 has no reference"),
        ([{"prompt": "1+1", "solution": None}], "row 0 has no reference"),
        ([{"prompt": "1+1", "solution": " "}], "row 0 has no reference"),
        ([{"prompt": [], "solution": "1"}], 'row 0 has no "prompt"'),
        ([{"prompt": "1+1", "solution": ["1"]}], "row 0: the solution is list"),
        (
            [ROWS[0], {"prompt": [{"role": "user"}], "solution": "1"}],
            "row 1: the content of message 0 is miss",
        ),
        ([ROWS[0], {"prompt": "1" * 59, "solution": "1"}], "row 1 has 59 tokens.*max_new_tokens 6.*64"),
    ],
)
def test_unusable_rows_are_named(model, tokenizer, rows, message):
    with pytest.raises(UserError, match=message):
        evaluate(model, tokenizer, rows, SETTINGS, progress=False)


def test_prompts_that_the_model_cannot_read_are_named(model, tokenizer):
    strict = copy.deepcopy(tokenizer)
    strict.add_tokens(["<new>"])
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    strict.chat_template = refusal + "{{ messages[0].content }}"
    question = {"role": "user", "content": "1+1"}
    refused = {"prompt": [{"role": "system", "content": "Be brief."}, question], "solution": "2"}
    said = r"^row 1 \('1\+1'\): the model's chat template refuses it \(no system\); fix or remove the row$"
    with pytest.raises(UserError, match=said):
        evaluate(model, strict, [{"prompt": [question], "solution": "2"}, refused], SETTINGS, progress=False)
    with pytest.raises(UserError, match=r"row 0 .* the model has \d+ embeddings"):
        evaluate(model, strict, [{"prompt": "<new>", "solution": "2"}], SETTINGS, progress=False)


@pytest.mark.parametrize(("number", "reference"), [(5e-05, "0.00005"), (1e16, "1" + "0" * 16), (12.0, "12")])
def test_numbers_as_reference_are_written_out(model, tokenizer, tmp_path, number, reference):
    settings = EvalSettings(samples=1, sampling=DRAWN)
    evaluate(model, tokenizer, [{"prompt": "1+1=", "solution": number}], settings, tmp_path, progress=False)
    assert records(tmp_path)[0]["reference"] == reference


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"batch_size": 0}])
def test_counts_below_one_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        EvalSettings(**wrong)


def test_a_dataset_works_like_a_list(finished, model, tokenizer, monkeypatch):
    from datasets import Dataset

    monkeypatch.setattr(rollouts, "generate", never)
    summary = evaluate(model, tokenizer, Dataset.from_list(ROWS), SETTINGS, finished, "random", False)
    assert summary["num_problems"] == 5
