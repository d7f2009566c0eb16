"""Which rows of which rollouts are supervised: truncation, groups per prompt, tools, long prompts."""

import copy
import json
import shutil
import zlib
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from transformers import GenerationConfig

import by_hand
from oprd.foundation.errors import UserError
from oprd.rollouts.generation import left_pad
from oprd.rollouts.rows import truncated_rollouts
from tiny_pair import prompt_texts
from tool import add

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 3, "b": 4}}\n</tool_call><|im_end|>'
ANSWER = "The sum is 7.<|im_end|>"


def draw(prompt_ids):
    """A number that depends on the prompt alone."""
    return zlib.crc32(str(prompt_ids).encode())


def by_length(prompt_ids):
    """Some prompts get an EOS, others reach the limit of 8."""
    ids = [10 + i % 7 for i in range(8)]
    return ids if draw(prompt_ids) % 3 == 0 else [*ids[: draw(prompt_ids) % 5], 2]


@pytest.mark.parametrize("left_out", [False, True])
def test_truncated_rollouts(make_trainer, left_out):
    trainer = make_trainer(
        script=by_length, mask_truncated_completions=left_out, per_device_train_batch_size=8, max_steps=1
    )
    batches = []
    weigh = trainer._generate_and_score_completions

    def keep(rows):
        batches.append(weigh(rows))
        return batches[-1]

    trainer._generate_and_score_completions = keep
    trainer.train()
    (batch,) = batches
    cut = batch["completion_mask"].sum(-1) == 8
    assert 0 < cut.sum() < 8
    for term in ("representation", "output"):
        rows = batch[f"{term}_weights"] > 0
        assert torch.equal(rows, batch["completion_mask"].bool() & ~(cut[:, None] & left_out))
        assert batch[f"{term}_weights"].sum().item() == pytest.approx(1)
    (entry,) = [e for e in trainer.state.log_history if "rollout/left_out" in e]
    assert entry["rollout/left_out"] == (cut.sum().item() if left_out else 0)
    assert entry["rollout/truncated_share"] == pytest.approx(cut.float().mean().item())
    assert entry["rollout/mean_length"] == pytest.approx(batch["completion_mask"].sum(-1).float().mean())
    assert entry["rollout/representation_rows"] == (batch["representation_weights"] > 0).sum()


@pytest.mark.parametrize("output", ["none", "sampled_token", "top_k", "full_vocab"])
def test_a_step_whose_rollouts_are_all_left_out(make_trainer, output):
    trainer = make_trainer(
        script=lambda prompt: [10] * 8, mask_truncated_completions=True, output_loss=output, optim="sgd"
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    entries = [e for e in trainer.state.log_history if "loss/total" in e]
    assert [e["loss/total"] for e in entries] == [0, 0]
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())


def test_truncated_rollouts_by_their_last_token():
    ids = torch.tensor([[5, 6, 2, 2], [5, 6, 7, 8], [5, 2, 7, 0], [4, 0, 0, 0], [9, 2, 2, 2]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0]])
    inputs = {"completion_ids": ids, "completion_mask": mask}
    assert truncated_rollouts(inputs, [2, 4]).tolist() == [False, True, True, False, False]


OPTIONS = {
    "min_new_tokens": 8,
    "no_repeat_ngram_size": 1,
    "suppress_tokens": list(range(3, 200)),
    "min_p": 0.9,
    "sequence_bias": [[[5], 20.0]],
    "exponential_decay_length_penalty": (1, 4.0),
    "repetition_penalty": 3.0,
    "temperature": 0.1,
    "num_beams": 2,
}


def test_rollouts_are_of_the_policy_whatever_its_generation_config_says(
    make_trainer, roll_out, student, tmp_path, caplog
):
    advised = shutil.copytree(student, tmp_path / "advised")
    config = GenerationConfig.from_pretrained(student)
    config.update(**OPTIONS)
    (advised / "generation_config.json").write_text(config.to_json_string())
    plain = roll_out(make_trainer(repetition_penalty=1.1))
    caplog.set_level("INFO")
    trainer = make_trainer(student=str(advised), repetition_penalty=1.1)
    assert torch.equal(roll_out(trainer)["completion_ids"], plain["completion_ids"])
    (told,) = [text for text in caplog.messages if "not used from the student's generation config" in text]
    named = {part.split(" ")[0] for part in told.partition("config: ")[2].split(", ")}
    assert OPTIONS.keys() <= named and "eos_token_id" not in named
    trainer.save_model(str(tmp_path / "saved"))
    saved = GenerationConfig.from_pretrained(tmp_path / "saved")
    assert saved.min_new_tokens == 8 and saved.sequence_bias == config.sequence_bias


def test_what_the_recipe_asks_of_generation_is_honoured(make_trainer, roll_out, caplog):
    caplog.set_level("INFO")
    trainer = make_trainer(generation_kwargs={"min_new_tokens": 8})
    assert roll_out(trainer)["completion_mask"].all()
    assert "set aside" not in caplog.text


def test_lengths_are_fitted_to_the_positions_of_both_models(make_trainer, make_folder, roll_out, caplog):
    short = make_folder(2, max_position_embeddings=64)
    caplog.set_level("INFO")
    trainer = make_trainer(teacher=short, max_completion_length=16384)
    longest = max(map(len, trainer.renderer(trainer.train_dataset["prompt"])))
    assert f"max_completion_length is {64 - longest}: the teacher has 64 positions" in caplog.text
    assert roll_out(trainer)["completion_mask"].sum(-1).max() <= 64 - longest
    assert trainer.args.max_completion_length == trainer.generation_config.max_new_tokens == 64 - longest
    make_trainer(teacher=short, max_completion_length=64 - longest)
    with pytest.raises(UserError, match=rf"max_completion_length is 63, .*lower it to {64 - longest}"):
        make_trainer(teacher=short, max_completion_length=63)
    with pytest.raises(UserError, match="none is left for a response"):
        make_trainer(student=make_folder(1, max_position_embeddings=longest))


def test_left_pad():
    ids, mask = left_pad([[1, 2, 3], [4]], pad_id=9)
    assert ids.tolist() == [[1, 2, 3], [9, 9, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize(("num_generations", "accumulation"), [(1, 1), (2, 1), (4, 2), (8, 2)])
def test_each_prompt_is_rolled_out_num_generations_times(make_trainer, num_generations, accumulation):
    trainer = make_trainer(num_generations=num_generations, gradient_accumulation_steps=accumulation)
    seen = []
    generate = trainer._generate_single_turn

    def keep(prompt_ids, *args, **kwargs):
        seen.append([tuple(ids) for ids in prompt_ids])
        return generate(prompt_ids, *args, **kwargs)

    trainer._generate_single_turn = keep
    trainer.train()
    assert len(seen) == 2  # one generation per optimiser step, whatever the accumulation
    for step in seen:
        assert len(step) == 4 * accumulation
        groups = [step[i : i + num_generations] for i in range(0, len(step), num_generations)]
        assert all(len(set(group)) == 1 for group in groups)
        assert len({group[0] for group in groups}) == len(groups)
    assert not set(seen[0]) & set(seen[1])


def test_num_generations_has_to_divide_the_batch(make_trainer):
    with pytest.raises(UserError, match=r"a step has 4 completions .* num_generations=3 does not divide"):
        make_trainer(num_generations=3)


def test_long_prompts_are_dropped_and_counted(make_trainer, tokenizer, caplog):
    lengths = [
        len(
            tokenizer.apply_chat_template([{"role": "user", "content": t}], add_generation_prompt=True)[
                "input_ids"
            ]
        )
        for t in prompt_texts(24)
    ]
    limit = sorted(lengths)[12]
    kept = sum(length <= limit for length in lengths)
    trainer = make_trainer(max_prompt_length=limit)
    assert len(trainer.train_dataset) == kept < 24
    assert f"dropped {24 - kept} of 24 prompts of more than {limit} tokens" in caplog.text
    with pytest.raises(UserError, match="All 24 prompts are longer than max_prompt_length=3"):
        make_trainer(max_prompt_length=3)


def test_text_prompts(make_trainer, roll_out, gradient):
    trainer = make_trainer(dataset=Dataset.from_dict({"prompt": prompt_texts(8)}))
    batch = roll_out(trainer)
    given = by_hand.rollouts(batch)
    assert given[0][0] == trainer._tokenizer(prompt_texts(1)[0])["input_ids"]
    models = trainer.model, trainer.teacher.model
    expected = by_hand.representation_loss(*models, given, [(1, 1), (2, 2)])
    assert gradient(trainer, batch)[0] == pytest.approx(expected.item(), rel=1e-5)


# Tools


@pytest.fixture
def tool_trainer(make_trainer, tokenizer):
    """Odd prompts get a tool call, its result and an answer; even ones an answer at once."""

    def make(**config):
        with_tools = copy.deepcopy(tokenizer)
        with_tools.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()

        def script(prompt_ids):
            text = with_tools.decode(prompt_ids)
            called = "tool_response>\n7" in text or draw(prompt_ids) % 2
            return with_tools(ANSWER if called else CALL)["input_ids"]

        return make_trainer(
            script=script,
            max_completion_length=400,
            extra={"tools": [add], "processing_class": with_tools},
            **config,
        )

    return make


@pytest.mark.parametrize("positions", ["all", "last=30", "first=20"])
@pytest.mark.parametrize("loss", ["representation", "output"])
def test_tool_output_is_not_supervised(tool_trainer, roll_out, gradient, tokenizer, positions, loss):
    kind = {"output_loss": "full_vocab"}
    terms = (
        {"positions": positions}
        if loss == "representation"
        else {"representation_weight": "0", "output_positions": positions, **kind}
    )
    trainer = tool_trainer(reduction="token", mask_truncated_completions=True, **terms)
    batch = roll_out(trainer, count=8)
    given = by_hand.rollouts(batch)
    with_calls = [not all(own) for _, _, own in given]
    assert any(with_calls) and not all(with_calls)
    call, answer = tokenizer(CALL)["input_ids"], tokenizer(ANSWER)["input_ids"]
    for i, (_, completion, own) in enumerate(given):
        written = [token for token, mine in zip(completion, own, strict=True) if mine]
        result = tokenizer.decode([t for t, mine in zip(completion, own, strict=True) if not mine])
        assert written == ([*call, *answer] if with_calls[i] else answer)
        assert ("<tool_response>\n7\n</tool_response>" in result) is with_calls[i]
        rows = (batch[f"{loss}_weights"][i] > 0).nonzero()[:, 0].tolist()
        assert rows == by_hand.chosen(own, positions)
    models = trainer.model, trainer.teacher.model
    expected = (
        by_hand.representation_loss(*models, given, [(1, 1), (2, 2)], "mse", positions, "token")
        if loss == "representation"
        else by_hand.output_loss(*models, given, kind, positions, "token")
    )
    assert gradient(trainer, batch)[0] == pytest.approx(expected.item(), rel=1e-5)


def test_a_run_with_tools(tool_trainer, tmp_path):
    trainer = tool_trainer()
    trainer.train()
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 2 and all(record["rollout/truncated_share"] == 0 for record in records)


def test_tools_need_chats(tool_trainer):
    with pytest.raises(UserError, match="tools need chat prompts, and these are text"):
        tool_trainer(dataset=Dataset.from_dict({"prompt": ["What is 3?"] * 4}))


def test_a_teacher_with_its_own_template_sees_the_tools(tool_trainer, roll_out):
    """The same template, so the same prompt: tool definitions included."""
    trainer = tool_trainer(teacher_chat_template="own")
    trainer.translation.tokenizer = trainer._tokenizer
    batch = roll_out(trainer)
    assert torch.equal(batch["teacher_prompt_ids"], batch["prompt_ids"])


def test_text_that_begins_with_a_bos_gets_no_second_one(make_trainer, tokenizer, roll_out):
    """Tokenizers as Llama's put a BOS before text, and so do some datasets."""
    bos = copy.deepcopy(tokenizer)
    bos.bos_token = "<|im_start|>"
    single = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", bos.bos_token_id)])
    bos.backend_tokenizer.post_processor = single
    rows = Dataset.from_dict({"prompt": ["<|im_start|>What is 3?", "What is 3?"] * 4})
    trainer = make_trainer(dataset=rows, script=by_length, extra={"processing_class": bos})
    batch = roll_out(trainer, 4)
    for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"].bool(), strict=True):
        assert ids[mask].tolist() == [bos.bos_token_id, *tokenizer("What is 3?")["input_ids"]]
