"""Prompts: every source and row format, and a clear sentence for every mistake."""

import json
import math
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import oprd.rollouts.prompts
from oprd.foundation.errors import UserError
from oprd.models.tiny import task
from oprd.rollouts.prompts import load_prompts
from places import ROOT

SHARED = ROOT.parent / "shared" / "data"
NUM_SHARED_ROWS = {
    "dapo-math-17k": 17917,
    "aime24": 30,
    "aime25": 30,
    "aimo": 83,
    "amc23": 40,
    "math-500": 500,
}

Row = dict[str, Any]


def chat(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def verl_row(content: str, ground_truth: Any) -> Row:
    reward_model = {"ground_truth": ground_truth, "style": "rule"}
    return {"data_source": "math", "prompt": chat(content), "reward_model": reward_model}


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load_rows(tmp_path: Path, rows: list[Any]) -> list[Row]:
    return load_prompts(write_jsonl(tmp_path / "rows.jsonl", rows)).to_list()


# Sources


@pytest.mark.parametrize(("split", "task_split"), [("train", "train"), ("eval", "eval"), ("test", "eval")])
def test_tiny_is_the_bundled_task(split, task_split):
    assert load_prompts("tiny", split).to_list() == task.rows(task_split)


@pytest.mark.parametrize(
    "file", ["rows.jsonl", "rows.json", "ROWS.JSONL", "list.json", "data.json", "rows.parquet"]
)
def test_every_file_kind_gives_the_same_rows(tmp_path, file):
    rows = [
        {"prompt": chat("Wie groß ist √2 + 四?"), "solution": "½", "id": 1},
        {"prompt": chat("b"), "solution": "2"},
    ]
    path = tmp_path / file
    if file == "rows.parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif file in ("list.json", "data.json"):
        document = rows if file == "list.json" else {"version": 1, "data": rows}
        path.write_text(json.dumps(document, ensure_ascii=False, indent=1), encoding="utf-8")
    else:
        write_jsonl(path, rows)
    assert load_prompts(str(path)).to_list() == [{k: row[k] for k in ("prompt", "solution")} for row in rows]


def test_one_object_is_one_row(tmp_path):
    path = tmp_path / "one.json"
    path.write_text('{"prompt": "a"}\n')
    assert load_prompts(str(path)).to_list() == [{"prompt": "a"}]


def test_jsonl_with_crlf_blank_lines_byte_order_mark_and_line_separators(tmp_path):
    path = tmp_path / "rows.jsonl"
    text = '\ufeff{"prompt": "é"}\r\n\r\n{"prompt": "a\u2028b\x85c"}\r\n  \r\n\n'
    path.write_bytes(text.encode())
    assert load_prompts(str(path))["prompt"][:] == ["é", "a\u2028b\x85c"]


def test_an_edited_file_is_read_anew(tmp_path):
    assert load_rows(tmp_path, [{"prompt": "a"}]) == [{"prompt": "a"}]
    assert load_rows(tmp_path, [{"prompt": "b"}]) == [{"prompt": "b"}]
    assert load_prompts(str(tmp_path / "rows.jsonl")).cache_files == []


def test_folder_is_read_in_name_order_beside_other_files(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", [{"prompt": "b"}])
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a"}])
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "._a.jsonl").write_bytes(b"\0\5\x16\7")  # what macOS puts beside a file
    assert load_prompts(str(tmp_path))["prompt"][:] == ["a", "b"]


def test_folder_with_split_names_never_mixes_train_and_test(tmp_path):
    write_jsonl(tmp_path / "train-00000.jsonl", [{"prompt": "a"}])
    write_jsonl(tmp_path / "train-00001.jsonl", [{"prompt": "b"}])
    write_jsonl(tmp_path / "test.jsonl", [{"prompt": "held out"}])
    assert load_prompts(str(tmp_path))["prompt"][:] == ["a", "b"]
    assert load_prompts(str(tmp_path), "test")["prompt"][:] == ["held out"]
    with pytest.raises(UserError, match=r"no file of split 'dev' \(found test.jsonl, train-00000.jsonl"):
        load_prompts(str(tmp_path), "dev")


def test_hub_dataset(monkeypatch):
    def load_dataset(*args: Any, **kwargs: Any) -> datasets.Dataset:
        assert (args, kwargs) == (("org/name", "algebra"), {"split": "train[:2]"})
        return datasets.Dataset.from_list([verl_row("a", "1"), verl_row("b", "2")])

    monkeypatch.setattr(oprd.rollouts.prompts, "load_dataset", load_dataset)
    rows = load_prompts("org/name", "train[:2]", "algebra").to_list()
    assert rows == [{"prompt": chat("a"), "solution": "1"}, {"prompt": chat("b"), "solution": "2"}]


def test_of_a_streamed_hub_dataset_only_the_first_rows_are_fetched(monkeypatch):
    fetched = []

    def rows():
        for n in range(10**9):
            fetched.append(n)
            yield verl_row(str(n), "1")

    def load_dataset(*args: Any, **kwargs: Any) -> datasets.IterableDataset:
        assert (args, kwargs) == (("org/name", None), {"split": "train", "streaming": True})
        return datasets.IterableDataset.from_generator(rows)

    monkeypatch.setattr(oprd.rollouts.prompts, "load_dataset", load_dataset)
    assert load_prompts("org/name", streamed=3)["prompt"][:] == [chat("0"), chat("1"), chat("2")]
    assert len(fetched) < 10


# Row formats


def test_verl_rows(tmp_path):
    rows = load_rows(tmp_path, [verl_row("a", "34"), verl_row("b", 7)])
    assert rows == [{"prompt": chat("a"), "solution": "34"}, {"prompt": chat("b"), "solution": "7"}]


@pytest.mark.parametrize(
    ("columns", "solution"),
    [
        ({"solution": "1", "answer": "2"}, "1"),
        ({"solution": None, "answer": 2}, "2"),
        ({"reward_model": {"ground_truth": 2.5}, "answer": "3"}, "2.5"),
        ({"solution": math.nan, "answer": "4"}, "4"),
        ({"answer": ""}, ""),
    ],
)
def test_where_the_solution_comes_from(tmp_path, columns, solution):
    assert load_rows(tmp_path, [{"prompt": "a"} | columns])[0]["solution"] == solution


@pytest.mark.parametrize("columns", [{}, {"solution": None}, {"reward_model": None}, {"reward_model": {}}])
def test_without_solutions_there_is_no_such_column(tmp_path, columns):
    assert load_rows(tmp_path, [{"prompt": "a"} | columns]) == [{"prompt": "a"}]


CALL = {"id": "7", "type": "function", "function": {"name": "add", "arguments": {"x": 1.5, "n": 10**12}}}
OTHER = {"id": "8", "type": "function", "function": {"name": "say", "arguments": '{"text": "hi"}'}}
TOOL_CHAT = [
    {"role": "system", "content": "Be brief.", "name": "boss"},
    {"role": "user", "content": "Add."},
    {"role": "assistant", "tool_calls": [CALL], "reasoning_content": "Hm."},
    {"role": "tool", "name": "add", "tool_call_id": "7", "content": ""},
]
OTHER_CHAT = [
    {"role": "assistant", "content": "", "tool_calls": [OTHER]},
    {"role": "tool", "tool_call_id": "8", "content": "ok"},
]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "json_parquet"])
def test_messages_keep_all_their_keys_and_get_no_nulls(tmp_path, kind):
    """Also where rows differ in them, which Arrow would fill with nulls, or refuse."""
    rows = [{"prompt": TOOL_CHAT}, {"prompt": chat("a")}, {"prompt": [*TOOL_CHAT, *OTHER_CHAT]}]
    path = tmp_path / f"rows.{kind.removeprefix('json_')}"
    if kind == "jsonl":
        write_jsonl(path, rows)
    elif kind == "parquet":  # of one type: another call's arguments as text would not fit
        rows = rows[:2]
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        datasets.Dataset.from_list(rows, on_mixed_types="use_json").to_parquet(path)
    assert load_prompts(str(path)).to_list() == rows


def test_a_message_of_other_keys_far_down_the_file_keeps_them(tmp_path):
    rows = [{"prompt": chat("a")}] * 3000 + [{"prompt": TOOL_CHAT}]
    loaded = load_rows(tmp_path, rows)
    assert loaded[-1] == rows[-1] and loaded[0] == rows[0]


def test_without_answers_only_the_prompts_are_read(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "answer": ["1"]}, {"prompt": "b", "answer": 2}])
    with pytest.raises(UserError, match="row 0: the solution is list"):
        load_prompts(path)
    assert load_prompts(path, answers=False).to_list() == [{"prompt": "a"}, {"prompt": "b"}]


def test_text_that_is_json_stays_text(tmp_path):
    texts = ['{"a": 1}', "3", "null", "[]"]
    assert load_rows(tmp_path, [{"prompt": text} for text in texts]) == [{"prompt": text} for text in texts]
    chats = [[{"role": "user", "content": text, "name": text}] for text in texts]
    rows = [
        {"prompt": chat, "solution": text} for chat, text in zip([*chats[1:], chat("a")], texts, strict=True)
    ]
    assert load_rows(tmp_path, rows) == rows


def test_text_parts_become_text(tmp_path):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": " b", "image": None}]
    assert load_rows(tmp_path, [{"prompt": [{"role": "user", "content": parts}]}]) == [
        {"prompt": chat("a b")}
    ]


def test_malformed_prompts_are_dropped_and_counted_if_asked(tmp_path, caplog):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a"}, {"prompt": None}, {"prompt": ""}])
    assert load_prompts(path, drop_malformed=True).to_list() == [{"prompt": "a"}]
    assert "dropped 2 of 3 malformed prompts, the first:" in caplog.text and "row 1" in caplog.text
    path = write_jsonl(tmp_path / "b.jsonl", [{"prompt": None}])
    with pytest.raises(UserError, match="all 1 prompts are malformed"):
        load_prompts(path, drop_malformed=True)


# Mistakes


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": None}, "row 1: the prompt is missing"),
        ({"text": "a"}, "row 1: the prompt is missing"),
        ({"prompt": 5}, "row 1: the prompt is int '5'"),
        ({"prompt": []}, r"row 1: the prompt is list '\[\]'"),
        ({"prompt": " \n"}, "row 1: the prompt is empty"),
        ({"prompt": ["a"]}, "row 1: message 0 is str 'a'"),
        ({"prompt": [{"role": "user"}]}, "row 1: the content of message 0 is missing"),
        ({"prompt": [{"content": "a"}]}, "row 1: the role of message 0 is missing"),
        (
            {"prompt": [*chat("a"), {"role": "user", "content": ["b"]}]},
            "row 1: the content of message 1 is list",
        ),
        ({"prompt": chat("")}, "row 1: the content of message 0 is empty"),
        ({"prompt": [{"role": "user", "tool_calls": [1]}]}, "row 1: the content of message 0 is missing"),
        ({"prompt": [{"role": "assistant", "tool_calls": []}]}, "row 1: the content of message 0 is missing"),
        ({"prompt": [{"role": "assistant", "tool_calls": [{}]}]}, "row 1: the prompt ends with tool calls"),
        ({"prompt": chat([])}, "row 1: the content of message 0 is empty"),
        ({"prompt": chat([{"type": "image_url"}])}, "row 1: .* has a part of type 'image_url'.*text-only"),
        ({"prompt": chat([{"image": "x.png"}])}, "row 1: .* has a part of type 'image'"),
        ({"prompt": "text"}, "row 1: text and chat prompts are mixed"),
        ({"prompt": chat("a"), "solution": ["1"]}, "row 1: the solution is list"),
        ({"prompt": chat("a")}, "row 1 has no solution"),
        ({"prompt": [{**chat("a")[0], "seeds": [2**64]}], "solution": "1"}, "row 1: message 0 .* 64 bits"),
        ({"prompt": chat("half an emoji \ud83d"), "solution": "1"}, "broken Unicode"),
        (["a"], "row 1: list .* is not an object"),
    ],
)
def test_bad_row_is_named(tmp_path, row, message):
    with pytest.raises(UserError, match=message) as caught:
        load_rows(tmp_path, [{"prompt": chat("good"), "solution": "1"}, row])
    assert "rows.jsonl" in str(caught.value)


def test_bad_row_of_a_folder_is_named_by_its_file(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    write_jsonl(tmp_path / "b.jsonl", [{"prompt": "c"}, {"prompt": ""}])
    with pytest.raises(UserError, match=r"b\.jsonl, row 1: the prompt is empty"):
        load_prompts(str(tmp_path))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_no_prompt_column_names_those_found(tmp_path, kind):
    path = tmp_path / f"rows.{kind}"
    rows = [{"problem": "a", "answer": "1"}]
    if kind == "jsonl":
        write_jsonl(path, rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    said = r"no column 'prompt' \(found problem, answer\): rename 'problem' to 'prompt'"
    with pytest.raises(UserError, match=said):
        load_prompts(str(path))


def test_odd_and_many_columns_are_told_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"\(found 'a\\nb', x0, .*, x18, …\): rename or add it"):
        load_rows(tmp_path, [{"a\nb": 1} | {f"x{i}": i for i in range(500)}])


@pytest.mark.parametrize(
    ("file", "text"), [("a.jsonl", ""), ("a.json", "\n"), ("a.json", "[]"), ("a.jsonl", "\r\n")]
)
def test_empty_dataset(tmp_path, file, text):
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match="has no rows"):
        load_prompts(str(tmp_path / file))


@pytest.mark.parametrize(
    ("file", "text", "line"),
    [
        ("a.jsonl", '{"prompt": "a"}\n\n{"prompt": \n', 3),
        ("a.json", '{"prompt": "a"}\n{"prompt": "b"}\n{"prompt" "c"}\n', 3),
        ("a.json", '[\n {"prompt": "a"},\n {"prompt" "b"}\n]', 3),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": "b", "id": ' + "9" * 5000 + "}", 2),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": ' + "[" * 100_000, 2),
        ("a.json", '{"prompt": ' + '{"a": ' * 100_000, 1),
    ],
    ids=range(6),
)
def test_malformed_json_names_file_and_line(tmp_path, file, text, line):
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=rf"{file}, line {line}: malformed JSON"):
        load_prompts(str(tmp_path / file))


def test_unreadable_files(tmp_path):
    for file, message in [("a.parquet", "cannot be read as parquet"), ("a.jsonl", "cannot be read as UTF-8")]:
        (tmp_path / file).write_bytes(b"\xff\xfe\x00PAR")
        with pytest.raises(UserError, match=rf"{file}: {message}"):
            load_prompts(str(tmp_path / file))
    (tmp_path / "a.csv").write_text("prompt\na\n")
    with pytest.raises(UserError, match=r"a\.csv: not a \.parquet, \.jsonl, \.json file"):
        load_prompts(str(tmp_path / "a.csv"))


def test_folder_without_data_or_with_two_kinds(tmp_path):
    with pytest.raises(UserError, match=r"the folder has no \.parquet, \.jsonl, \.json file"):
        load_prompts(str(tmp_path))
    for file in ("a.json", "a.jsonl"):
        write_jsonl(tmp_path / file, [{"prompt": "a"}])
    with pytest.raises(UserError, match=r"mixes \.json and \.jsonl files"):
        load_prompts(str(tmp_path))


@pytest.mark.parametrize("depth", [60, 70, 900])
def test_messages_nested_deeply_are_kept_or_refused(tmp_path, depth):
    deep: Any = "x"
    for _ in range(depth):
        deep = [deep]
    rows = [{"prompt": [*chat("a"), {"role": "user", "content": "b", "extra": deep}]}]
    if depth == 60:
        assert load_rows(tmp_path, rows) == rows
        return
    with pytest.raises(UserError, match=r"rows\.jsonl, row 0: message 1 is nested more than 64 levels deep"):
        load_rows(tmp_path, rows)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 2**31), byte=st.integers(0, 255), cut=st.booleans())
@example(at=4075, byte=0, cut=False)  # a struct's field has two names
def test_a_damaged_parquet_file_is_read_or_refused(tmp_path, at, byte, cut):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([verl_row("ab", 0.5), verl_row("c", 2.0)]), path, compression="NONE")
    damaged = bytearray(path.read_bytes())
    at %= len(damaged)
    damaged[at] = byte
    path.write_bytes(damaged[:at] if cut else damaged)
    with suppress(UserError):
        load_prompts(str(path))


def test_names_that_are_no_paths(tmp_path):
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, message in [
        (str(tmp_path / "gone.jsonl"), r"gone\.jsonl: a link to .*nowhere\.jsonl, where nothing is"),
        (str(tmp_path / "loop"), "loop: a link to .*loop, where nothing is"),
        ("x" * 300, r"x{80}: no such file or folder \(File name too long\)"),
        ("~nobody-of-that-name/a.jsonl", "no such file or folder"),
    ]:
        with pytest.raises(UserError, match=message):
            load_prompts(name)
    with pytest.raises(UserError, match=r"gone\.jsonl: cannot be read"):
        load_prompts(str(tmp_path))  # a folder with the link in it


@pytest.mark.parametrize("name", ["nowhere.jsonl", "./nowhere", "a/b/c", "/nowhere/at/all"])
def test_missing_path_never_asks_the_hub(monkeypatch, name):
    monkeypatch.delattr(oprd.rollouts.prompts, "load_dataset")
    with pytest.raises(UserError, match=f"{name}: no such file or folder"):
        load_prompts(name)


def test_hub_failure_says_what_was_tried(monkeypatch):
    def load_dataset(*args: Any, **kwargs: Any) -> datasets.Dataset:
        raise ConnectionError("Couldn't reach the Hub\nlong story")

    monkeypatch.setattr(oprd.rollouts.prompts, "load_dataset", load_dataset)
    tried = (
        r"org/name: no such file or folder, .* \(config None, split 'test'\) failed: Couldn't reach the Hub$"
    )
    with pytest.raises(UserError, match=tried):
        load_prompts("org/name", "test")


def test_options_that_a_local_source_lacks(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a"}])
    with pytest.raises(UserError, match=r"only Hub datasets .* leave out config 'main'"):
        load_prompts(path, config="main")
    with pytest.raises(UserError, match=r"leave out the slice 'train\[:9\]'"):
        load_prompts(path, "train[:9]")
    with pytest.raises(UserError, match="leave out dataset_streaming"):
        load_prompts(path, streamed=8)
    with pytest.raises(UserError, match=r"tiny has the splits train and eval .* not 'dev'"):
        load_prompts("tiny", "dev")


# Real files


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data are not here")
@pytest.mark.parametrize(("name", "num_rows"), NUM_SHARED_ROWS.items())
def test_real_files_load_whole_and_fast(name, num_rows):
    start = time.process_time()
    dataset = load_prompts(str(SHARED / f"{name}.parquet"))
    assert time.process_time() - start < 5
    source = pq.read_table(SHARED / f"{name}.parquet").to_pylist()
    assert len(dataset) == num_rows
    assert dataset["solution"][:] == [row["reward_model"]["ground_truth"] for row in source]
    assert dataset["prompt"][:] == [row["prompt"] for row in source]
