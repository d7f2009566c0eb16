"""Reference answers: numbers as a grader reads them, and the column that holds them."""

import json
import logging
import math
from decimal import Decimal
from fractions import Fraction

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oprd.foundation.errors import UserError
from oprd.rollouts.prompts import load_prompts
from oprd.text.answers import answer_text, reference_answers

PROSE = "First we add both numbers, which gives us seven, and then we take away two of them."
BOXED = PROSE + r" So there are $\boxed{5}$ of them left in the end, as we wanted."
GSM8K = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nIn all she sold 48+24 = 72 clips.\n#### 72"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.00001, "0.00001"),
        (5e-05, "0.00005"),
        (1e16, "10000000000000000"),
        (1e-7, "0.0000001"),
        (12.0, "12"),
        (-0.0, "0"),
        (-2.5, "-2.5"),
        (0.1 + 0.2, "0.30000000000000004"),
        (10**30, "1" + "0" * 30),
        (Decimal("1E+3"), "1000"),
        (Decimal("12.50"), "12.50"),
        (Fraction(1, 3), "1/3"),
        (np.float32(0.1), "0.1"),
        (np.float16(1e-3), "0.001"),
        (np.float64(5e-5), "0.00005"),
        (np.int64(7), "7"),
        (np.bool_(True), "True"),
        (False, "False"),
        (math.inf, r"\infty"),
        (-math.inf, r"-\infty"),
        ("5e-05", "5e-05"),
        (GSM8K, "72"),
        ("#### 1,234 \n", "1,234"),
        ("#### Step 1\nAdd.", "#### Step 1\nAdd."),
        ("So:\n####42\n", "42"),
        ("##### 42", "##### 42"),
        ("Add.\n####", "Add.\n####"),
        ("#### a" + " " * 10**6 + "b", "a" + " " * 10**6 + "b"),
        (math.nan, None),
        (Decimal("NaN"), None),
        (None, None),
    ],
)
def test_answers_as_text(value, text):
    assert answer_text(value, "row 0") == text


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_is_written_out_and_reads_back(number):
    text = answer_text(number, "row 0")
    assert float(text) == number
    assert "e" not in text.lower()


@pytest.mark.parametrize("value", [["1"], {"a": 1}, b"1"])
def test_what_is_no_answer_is_refused(value):
    with pytest.raises(UserError, match="row 3: the solution is"):
        answer_text(value, "row 3")


LITERALS = [
    "0.00001",
    "5e-05",
    "1e16",
    "12.0",
    "3.14159265358979323846",
    "12.50",
    "-7",
    "123456789012345678901",
    "1E400",
]
TEXTS = [
    "0.00001",
    "0.00005",
    "1" + "0" * 16,
    "12",
    "3.14159265358979323846",
    "12.50",
    "-7",
    "123456789012345678901",
]


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_numbers_of_json_are_those_that_are_written_there(tmp_path, kind):
    path = tmp_path / f"rows.{kind}"
    rows = ['{"prompt": "a", "solution": ' + literal + "}" for literal in LITERALS]
    path.write_text("[" + ",".join(rows) + "]" if kind == "json" else "\n".join(rows))
    assert load_prompts(str(path))["solution"][:] == [*TEXTS, "1" + "0" * 400]


@pytest.mark.parametrize(
    "kind", [pa.float64(), pa.float32(), pa.float16(), pa.decimal128(10, 5), pa.int64(), pa.string()]
)
@pytest.mark.parametrize("nested", [True, False])
def test_numbers_of_parquet(tmp_path, kind, nested):
    values = {"double": [0.00005, 12.0, 0.1], "float": [0.00005, 12.0, 0.1], "halffloat": [0.5, 12.0, 0.1]}
    cells = values.get(str(kind), [1, 12, 3])
    if kind == pa.decimal128(10, 5):
        cells = [Decimal("0.00005"), Decimal("12"), Decimal("0.1")]
    if kind == pa.string():
        cells = ["½", "12", "0.1"]
    column = pa.array(cells, kind)
    answer = pa.StructArray.from_arrays([column], ["ground_truth"]) if nested else column
    table = pa.table({"prompt": ["a", "b", "c"], "reward_model" if nested else "answer": answer})
    pq.write_table(table, tmp_path / "rows.parquet")
    expected = {
        "double": ["0.00005", "12", "0.1"],
        "float": ["0.00005", "12", "0.1"],
        "halffloat": ["0.5", "12", "0.1"],
        "decimal128(10, 5)": ["0.00005", "12", "0.10000"],
        "int64": ["1", "12", "3"],
        "string": ["½", "12", "0.1"],
    }[str(kind)]
    assert load_prompts(str(tmp_path / "rows.parquet"))["solution"][:] == expected


@pytest.mark.parametrize(
    ("rows", "answers"),
    [
        ([{"solution": PROSE, "answer": "5"}], ["5"]),
        ([{"solution": BOXED, "answer": 5}], ["5"]),
        ([{"solution": BOXED, "answer": None}], [BOXED]),
        ([{"solution": r"\frac{1}{2}", "answer": "0.5"}], [r"\frac{1}{2}"]),
        ([{"solution": PROSE, "reward_model": {"ground_truth": "5"}}], ["5"]),
        ([{"solution": "", "answer": "5"}], ["5"]),
        ([{"answer": GSM8K, "solution": PROSE}], ["72"]),
        ([{"answer": GSM8K}], ["72"]),
        ([{"solution": PROSE, "final_answer": "5"}], ["5"]),
        ([{"expected_answer": "5"}], ["5"]),
        ([{"ground_truth": 5}], ["5"]),
        ([{"solution": PROSE}], [PROSE]),
        ([{"solution": ["a"], "answer": "5"}], ["5"]),
        # One column for all rows, although a row's other column would do.
        ([{"solution": "1", "answer": "2"}, {"solution": PROSE, "answer": "4"}], ["2", "4"]),
        ([{"solution": BOXED, "answer": "2"}, {"solution": BOXED, "answer": None}], [BOXED, BOXED]),
        ([{"solution": PROSE, "answer": "2"}, {"solution": PROSE}], ["2", PROSE]),
        ([{}, {"answer": 1}], [None, "1"]),
        ([{}, {"solution": None}], [None, None]),
    ],
)
def test_the_column_that_holds_the_answers(rows, answers):
    assert reference_answers(rows, [f"row {i}" for i in range(len(rows))]) == answers


def test_the_choice_is_told_once(caplog):
    caplog.set_level(logging.INFO)
    rows = [{"solution": PROSE, "answer": "2"}, {"solution": BOXED, "answer": "3"}, {"solution": "1"}]
    reference_answers(rows, ["row 0", "row 1", "row 2"])
    assert [record.getMessage() for record in caplog.records] == [
        "reference answers are those of column answer (of 3 rows an answer that is short, boxed or after "
        "#### stands in: answer in 2, solution in 2); 1 rows without it take another column"
    ]
    caplog.clear()
    reference_answers([{"solution": "1"}, {"solution": "2"}], ["row 0", "row 1"])
    assert caplog.records == []


def test_a_hub_dataset_of_narrow_floats(monkeypatch):
    columns = {"prompt": ["a", "b"], "answer": [0.1, 5e-05]}
    features = datasets.Features({"prompt": datasets.Value("string"), "answer": datasets.Value("float32")})
    hub = datasets.Dataset.from_dict(columns, features=features)
    monkeypatch.setattr("oprd.rollouts.prompts.load_dataset", lambda *_, **__: hub)
    assert load_prompts("org/name")["solution"][:] == ["0.1", "0.00005"]


def test_json_floats_stay_numbers_in_tool_calls(tmp_path):
    call = {"function": {"name": "f", "arguments": {"x": 0.5}}}
    chat = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "1"}]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": chat}) + "\n" + json.dumps({"prompt": chat[1:]}))
    (first, _) = load_prompts(str(path))["prompt"][:]
    x = first[0]["tool_calls"][0]["function"]["arguments"]["x"]
    assert (x, type(x)) == (0.5, float)
