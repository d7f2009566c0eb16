"""Prompts as token ids: templates that refuse, turns that are continued, parts, tools, one BOS."""

import pytest
from tokenizers.processors import TemplateProcessing

from oprd.foundation.errors import UserError
from oprd.models.tiny.tokenizer import train_tokenizer
from oprd.text.rendering import Refusal, Renderer

QUESTION = [{"role": "user", "content": "Compute 1+2."}]
PARTIAL = [*QUESTION, {"role": "assistant", "content": "1+2="}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
CALLED = [
    *QUESTION,
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "name": "add", "tool_call_id": "7", "content": "3"},
]
STRICT = (  # as Gemma's: no system role, and roles take turns
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{- raise_exception('System role not supported') -}}{%- endif -%}"
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{- raise_exception('Conversation roles must alternate user/assistant') -}}{%- endif -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
WITH_TOOLS = (
    "{%- for message in messages -%}{{- message['role'] -}}"
    "{%- if message.tool_calls -%}{%- for call in message.tool_calls -%}{{- call.function | tojson -}}"
    "{%- endfor -%}{%- else -%}{{- message.name -}}{{- message.tool_call_id -}}{{- message.content -}}"
    "{%- endif -%};{%- endfor -%}"
)


@pytest.fixture
def tokenizer():
    return train_tokenizer(
        ["user\nCompute 1+2.", "assistant\n1+2=3", '{"name": "add", "arguments": {"x": 1}}']
    )


def written(tokenizer, prompt, **kwargs):
    (ids,) = Renderer(tokenizer, kwargs)([prompt])
    assert all(isinstance(i, int) for i in ids)
    return tokenizer.decode(ids)


def test_messages_go_through_the_chat_template(tokenizer):
    assert written(tokenizer, QUESTION) == "<|im_start|>user\nCompute 1+2.<|im_end|>\n<|im_start|>assistant\n"


def test_template_arguments_reach_the_template(tokenizer):
    tokenizer.chat_template = "{{ mood }}"
    assert written(tokenizer, QUESTION, mood="calm") == "calm"


@pytest.mark.parametrize("name", ["add_generation_prompt", "continue_final_message", "tokenize", "padding"])
def test_template_arguments_that_decide_the_rendering_are_refused(tokenizer, name):
    with pytest.raises(UserError, match=f"chat_template_kwargs: {name} is set by oprd"):
        Renderer(tokenizer, {name: True})


@pytest.mark.parametrize("prompt", [PARTIAL, CALLED, [{"role": "system", "content": "Be brief."}]])
def test_without_a_template_longer_chats_are_refused(tokenizer, prompt):
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="the student's tokenizer has no chat template, and without one only"):
        Renderer(tokenizer)([QUESTION, prompt])
    with pytest.raises(UserError, match="no chat template"):
        Renderer(tokenizer, {"tools": [CALL]})([QUESTION])
    assert Renderer(tokenizer)(["1+2"]) == [tokenizer("1+2")["input_ids"]]


def test_no_second_bos(tokenizer):
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", start)]
    )
    plain, with_bos = Renderer(tokenizer)(["1+2", "<|im_start|>1+2"])
    assert plain.count(start) == 1
    assert with_bos == plain
    assert Renderer(tokenizer)([QUESTION])[0][:2] != [start, start]


def test_a_partial_turn_is_continued_and_a_batch_keeps_its_order(tokenizer):
    opened = "<|im_start|>user\nCompute 1+2.<|im_end|>\n<|im_start|>assistant\n"
    read = Renderer(tokenizer)([PARTIAL, QUESTION, PARTIAL])
    assert [tokenizer.decode(ids) for ids in read] == [opened + "1+2=", opened, opened + "1+2="]
    assert read == [Renderer(tokenizer)([prompt])[0] for prompt in (PARTIAL, QUESTION, PARTIAL)]


def test_text_parts_read_as_their_text(tokenizer):
    parts = [{"type": "text", "text": "Compute ", "image": None}, {"type": "text", "text": "1+2."}]
    assert written(tokenizer, [{"role": "user", "content": parts}]) == written(tokenizer, QUESTION)


def test_tool_calls_names_and_ids_reach_the_template_without_arrows_nulls(tokenizer):
    tokenizer.chat_template = WITH_TOOLS
    expected = 'userCompute 1+2.;assistant{"name": "add", "arguments": {"x": 1}};tooladd73;'
    assert written(tokenizer, CALLED) == expected
    keys = {key: None for message in CALLED for key in message}
    filled = [keys | message for message in CALLED]
    function = CALL["function"] | {"arguments": {"x": 1, "y": None}}
    filled[1] = filled[1] | {"tool_calls": [CALL | {"function": function}]}
    assert written(tokenizer, filled) == expected


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ([{"role": "system", "content": "Be brief."}, *QUESTION], r"\(System role not supported\)"),
        ([*QUESTION, *QUESTION], r"\(Conversation roles must alternate user/assistant\)"),
        ([*QUESTION, CALLED[1], *QUESTION], r"\('dict object' has no attribute 'content'\)"),
    ],
)
def test_what_a_template_refuses_is_told_and_the_rest_is_rendered(tokenizer, prompt, reason):
    tokenizer.chat_template = STRICT
    first, refused, last = Renderer(tokenizer, reader="the teacher").attempt([QUESTION, prompt, PARTIAL])
    assert [first, last] == Renderer(tokenizer)([QUESTION, PARTIAL])
    assert isinstance(refused, Refusal)
    with pytest.raises(UserError, match=f"the teacher's chat template refuses it {reason}$"):
        Renderer(tokenizer, reader="the teacher")([QUESTION, prompt])


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ messages[3].content }}", "messages|list object"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ messages[0].content.nothing() }}", "nothing"),
        ("{% if %}", "Expected an expression"),
        ("{# nothing #}", "no token as the student reads it"),
    ],
)
def test_whatever_a_template_raises_is_a_refusal(tokenizer, template, reason):
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=reason):
        Renderer(tokenizer)([QUESTION])


def test_a_template_that_drops_the_partial_turn_refuses_it(tokenizer):
    tokenizer.chat_template = "{{ messages[0].content }}"
    (refused,) = Renderer(tokenizer).attempt([PARTIAL])
    assert isinstance(refused, Refusal) and "final message does not appear" in refused.reason
    assert "\n" not in refused.reason


def test_tokens_without_an_embedding_are_refused(tokenizer):
    ids = tokenizer("1+2")["input_ids"]
    assert Renderer(tokenizer, vocabulary=max(ids) + 1)(["1+2"]) == [ids]
    with pytest.raises(UserError, match=f"the token {max(ids)}, and the student has {max(ids)} embeddings"):
        Renderer(tokenizer, vocabulary=max(ids))(["1+2"])
