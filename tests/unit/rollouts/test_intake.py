"""The prompts that a run can use: all rendered before it starts; refused rows named, or counted."""

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from datasets import Dataset, IterableDataset

from oprd.foundation.errors import UserError
from oprd.foundation.ranks import Ranks
from oprd.models.tiny.tokenizer import train_tokenizer
from oprd.rollouts import intake
from oprd.rollouts.intake import look_ahead, stream_length, usable_prompts
from oprd.text.rendering import Renderer

NO_SYSTEM = (
    "{%- if messages[0]['role'] == 'system' -%}"
    "{{- raise_exception('System role not supported') -}}{%- endif -%}"
    "{%- for message in messages -%}{{- message['content'] -}}{%- endfor -%}"
)
SYSTEM = {"role": "system", "content": "Be brief."}


def chat(content, *before):
    return [*before, {"role": "user", "content": content}]


def rows(*prompts):
    return Dataset.from_dict({"prompt": list(prompts), "id": list(range(len(prompts)))})


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["x"], vocab_size=270)


@pytest.fixture
def student(tokenizer):
    return Renderer(tokenizer)


@pytest.fixture
def teacher(tokenizer):
    return Renderer(tokenizer, {"chat_template": NO_SYSTEM}, "the teacher")


@dataclass(frozen=True)
class Meeting(Ranks):
    """A rank whose processes are threads."""

    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(1))
    values: dict = field(default_factory=dict)

    def gather(self, value):
        self.values[self.index] = value
        self.barrier.wait(timeout=20)
        return [self.values[index] for index in range(self.count)]


def on_ranks(count, work):
    barrier, values = threading.Barrier(count), {}
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, [Meeting(i, count, barrier=barrier, values=values) for i in range(count)]))


def test_long_prompts_are_dropped_whole(student, caplog):
    data = rows(*("x" * n for n in (3, 6, 4, 5, 1)))
    usable = usable_prompts(data, [student], max_prompt_length=4)
    assert usable.dataset.to_dict() == {"prompt": ["xxx", "xxxx", "x"], "id": [0, 2, 4]}
    assert usable.lengths.tolist() == [[3, 4, 1]]
    assert "dropped 2 of 5 prompts of more than 4 tokens" in caplog.text
    assert usable_prompts(data, [student]).dataset is data
    with pytest.raises(UserError, match=r"All 5 prompts .* max_prompt_length=0 .*the shortest has 1"):
        usable_prompts(data, [student], max_prompt_length=0)


def test_lengths_are_those_of_every_reader(student, teacher):
    usable = usable_prompts(rows(chat("ab"), chat("abcd"), chat("ab")), [student, teacher])
    assert usable.lengths[1].tolist() == [2, 4, 2]
    assert (usable.lengths[0] - usable.lengths[1]).tolist() == [usable.lengths[0][0] - 2] * 3


def test_a_row_that_the_teachers_template_refuses_is_named(student, teacher):
    data = rows(chat("a"), chat("a"), chat("Why is that so?", SYSTEM), chat("b", SYSTEM))
    usable_prompts(data, [student])
    said = (
        r"^row 2 \('Why is that so\?'\): the teacher's chat template refuses it "
        r"\(System role not supported\); "
        "fix or remove the row, or set drop_unrenderable_prompts: true$"
    )
    with pytest.raises(UserError, match=said):
        usable_prompts(data, [student, teacher])


def test_refused_and_malformed_rows_are_dropped_and_counted_if_asked(student, teacher, caplog):
    silent = [{"role": "user", "content": None}]
    data = rows(silent, chat("a", SYSTEM), chat("b"), chat("a", SYSTEM), chat("b"), None)
    with pytest.raises(UserError, match="row 0: the content of message 0 is missing, not text"):
        usable_prompts(data, [student])
    usable = usable_prompts(data, [student, teacher], drop_unrenderable=True)
    assert usable.dataset["id"][:] == [2, 4]
    assert "dropped 4 of 6 prompts, the first: row 0: the content of message 0 is missing" in caplog.text


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (rows("a", None), "row 1: the prompt is missing"),
        (rows("a", " "), "row 1: the prompt is empty"),
        (
            rows([{"role": "user", "content": [{"type": "image", "text": None}]}]),
            "has a part of type 'image'",
        ),
        (Dataset.from_dict({"prompt": [["a"]]}), "row 0: message 0 is str 'a'"),
        (Dataset.from_dict({"problem": ["a"]}), "no column 'prompt'; it has problem"),
        (Dataset.from_dict({"prompt": ["a"], "images": [["x.png"]]}), "a column 'images'"),
        (Dataset.from_dict({"prompt": []}), "the dataset is empty"),
        (
            Dataset.from_dict({"prompt": ["a", chat("b")]}, on_mixed_types="use_json"),
            "row 1: text and chat prompts are mixed",
        ),
    ],
)
def test_what_is_no_prompt_is_named(student, data, message):
    with pytest.raises(UserError, match=message):
        usable_prompts(data, [student])


@pytest.mark.parametrize("format", ["numpy", "torch", "pandas"])
def test_a_format_that_makes_arrays_of_messages_is_left(student, format):
    usable = usable_prompts(rows(chat("a"), chat("b")).with_format(format), [student])
    assert usable.dataset[1] == {"prompt": chat("b"), "id": 1}


def test_a_transform_makes_the_prompts(student):
    data = Dataset.from_dict({"n": [1, 2]}).with_transform(lambda r: {"prompt": ["x" * n for n in r["n"]]})
    usable = usable_prompts(data, [student])
    assert usable.dataset[1] == {"prompt": "xx"}
    assert usable.lengths.tolist() == [[1, 2]]


def test_fewer_prompts_than_a_step_takes(student):
    with pytest.raises(UserError, match="a step takes 3 prompts, and the dataset has 2"):
        usable_prompts(rows("a", "b"), [student], needed=3)


def test_equal_prompts_are_rendered_once(tokenizer, monkeypatch):
    rendered = []
    monkeypatch.setattr(intake, "AT_ONCE", 2)

    class Counting(Renderer):
        def attempt(self, prompts):
            rendered.extend(prompts)
            return super().attempt(prompts)

    usable = usable_prompts(rows("ab", "a", "ab", "ab", "abc", "a", "ab"), [Counting(tokenizer)])
    assert usable.lengths.tolist() == [[2, 1, 2, 2, 3, 1, 2]]
    assert rendered == ["ab", "a", "abc"]


@pytest.mark.parametrize("count", [2, 3])
def test_ranks_share_the_rendering_and_agree(student, teacher, count):
    data = rows(*(chat("x" * n, *[SYSTEM] * (n == 4)) for n in range(1, 6)))
    alone = usable_prompts(data, [student, teacher], drop_unrenderable=True)
    for found in on_ranks(
        count, lambda rank: usable_prompts(data, [student, teacher], drop_unrenderable=True, ranks=rank)
    ):
        assert found.dataset["id"][:] == alone.dataset["id"][:] == [0, 1, 2, 4]
        assert found.lengths.tolist() == alone.lengths.tolist()

    def refuse(rank):
        with pytest.raises(UserError) as caught:
            usable_prompts(data, [student, teacher], ranks=rank)
        return str(caught.value)

    assert {said[:6] for said in on_ranks(count, refuse)} == {"row 3 "}


def test_ranks_do_not_wait_for_one_that_has_a_chat_and_no_template(tokenizer):
    bare = train_tokenizer(["x"], vocab_size=270)
    bare.chat_template = None

    def refuse(rank):
        with pytest.raises(UserError, match=r"row 1 .*no chat template"):
            usable_prompts(rows(chat("a"), chat("b", SYSTEM)), [Renderer(bare)], ranks=rank)

    on_ranks(2, refuse)


def stream(*prompts):
    return IterableDataset.from_generator(lambda: ({"prompt": prompt, "id": 1} for prompt in prompts))


def test_a_stream_is_read_as_far_as_a_run_takes(caplog):
    def endless():
        for n in range(10**9):
            yield {"prompt": chat(str(n)), "id": n}

    caplog.set_level(logging.INFO)
    data = look_ahead(IterableDataset.from_generator(endless), 3)
    assert data.to_dict() == {"prompt": [chat("0"), chat("1"), chat("2")]}
    assert "first 3 prompts" in caplog.text
    assert look_ahead(stream("a", "b"), 5)["prompt"][:] == ["a", "b"]
    call = {"role": "assistant", "tool_calls": [{"function": {"arguments": {"x": 1e-12}}}]}
    prompts = [[call, {"role": "tool", "content": "1"}], chat("a"), None]
    assert look_ahead(stream(*prompts), 5)["prompt"][:] == prompts


def test_streams_that_give_no_prompts():
    with pytest.raises(UserError, match="set max_steps"):
        stream_length(SimpleNamespace(max_steps=-1), 1)
    for prompts, kinds in (("a", chat("b")), "list and str"), ((5, 6), "int"):
        with pytest.raises(UserError, match=f"the stream's prompts are {kinds}: give text, or lists of mess"):
            look_ahead(stream(*prompts), 2)
    with pytest.raises(UserError, match="no column 'prompt'; it has text"):
        look_ahead(IterableDataset.from_generator(lambda: ({"text": "a"} for _ in range(2))), 2)
