"""A teacher with a tokenizer and a template of its own: what it reads, which rows meet, what is refused."""

import copy
import json
import zlib
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import by_hand
from oprd.foundation.errors import UserError
from oprd.models.tiny import tokenizer as designs
from oprd.models.tiny.tokenizer import train_tokenizer
from oprd.objective.losses import REPRESENTATION_LOSSES
from oprd.rollouts.rows import truncated_rollouts
from random_bridge import PAIRS, READING, save_random_bridge
from tiny_pair import SIZES, perturb, prompt_texts
from tool import add
from updates import agree, close, pieces

WORDS = ["the sum is twelve", "naïve café, 12345+67=12412", "the answer is 98765 and not 1"]
END = "<|im_end|>"
TEXTS = [
    "the sum of 12345 and 678 is 13023." + END,
    "naïve 😀 café, 98+7=105" + END,
    "1234567" + END,
    END,
    "the answer, cut: 12345678",
]
LIMIT = 40


@pytest.fixture(scope="session")
def student(make_folder):
    return make_folder(1, num_hidden_layers=3)


@pytest.fixture(scope="session")
def teacher_tokenizer():
    return train_tokenizer(WORDS * 9, vocab_size=300, design=designs.PAIRS)


@pytest.fixture(scope="session")
def make_teacher(tmp_path_factory):
    """`make_teacher(tokenizer, vocab_size=None)`: a folder of a deeper, wider model."""

    def make(tokenizer, vocab_size=None):
        torch.manual_seed(0)
        sizes = {"num_hidden_layers": 5, "hidden_size": 48, "vocab_size": vocab_size or len(tokenizer)}
        model = Qwen3ForCausalLM(Qwen3Config(**(SIZES | sizes)))
        perturb(model, 2)
        folder = tmp_path_factory.mktemp("teacher")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return make


@pytest.fixture(scope="session")
def teacher(make_teacher, teacher_tokenizer):
    return make_teacher(teacher_tokenizer)


@pytest.fixture(scope="session")
def make_bridge(tmp_path_factory, student, teacher):
    """`make_bridge(teacher=teacher, **reading)`: the file of a bridge whose fit read with these settings."""
    return lambda teacher=teacher, **reading: save_random_bridge(
        tmp_path_factory.mktemp("bridge"), student, teacher, reading=READING | reading
    )


@pytest.fixture(scope="session")
def bridge(make_bridge):
    return make_bridge()


@pytest.fixture(scope="session")
def spell(tokenizer):
    """`spell(texts)`: a script that answers each prompt with one of `texts`, or of lists of token ids."""

    def script(texts):
        ids = [tokenizer(text)["input_ids"] if isinstance(text, str) else text for text in texts]
        return lambda prompt_ids: ids[zlib.crc32(str(prompt_ids).encode()) % len(ids)][:LIMIT]

    return script


@pytest.fixture(scope="session")
def broken(tokenizer):
    """Two words, a byte that no UTF-8 holds, three words and an EOS."""
    words, end = tokenizer("What is")["input_ids"], tokenizer(" plus and then" + END)["input_ids"]
    return [*words, tokenizer.convert_tokens_to_ids("ÿ"), *end]


@pytest.fixture(scope="session")
def unreadable(tokenizer):
    """A byte that no UTF-8 holds, then text."""
    return [tokenizer.convert_tokens_to_ids("ÿ"), *tokenizer("the answer" + END)["input_ids"]]


@pytest.fixture
def make(make_trainer, spell, bridge):
    """`make(texts=TEXTS, **config)`: a trainer whose student writes `texts`."""

    def build(texts=TEXTS, **config):
        settings = {"bridge": bridge, "script": spell(texts), "max_completion_length": LIMIT}
        return make_trainer(**(settings | config))

    return build


def own_prompts(tokenizer, count):
    texts = [f"<|user|>{text}<|end|><|assistant|>" for text in prompt_texts(count)]
    return [tokenizer(text)["input_ids"] for text in texts]


def readings(trainer, given):
    """By hand: what the teacher reads of every rollout, and the pairs of rows."""
    prompts = own_prompts(trainer.teacher.tokenizer, len(given))
    ours, theirs = trainer._tokenizer, trainer.teacher.tokenizer
    return [
        (prompt, *by_hand.translated(ours, theirs, completion))
        for prompt, (_, completion, _) in zip(prompts, given, strict=True)
    ]


def ends(trainer):
    return trainer._tokenizer.eos_token_id, trainer.teacher.tokenizer.eos_token_id


def expected_loss(trainer, given, path, read=(), **kind):
    models = trainer.model, trainer.teacher.model
    return by_hand.bridge_loss(*models, given, PAIRS, load_file(path), read=read, **kind)


def test_the_rollouts_are_worth_testing_on(make, roll_out):
    trainer = make()
    given = by_hand.rollouts(roll_out(trainer, 12))
    read = readings(trainer, given)
    assert {tuple(completion) for _, completion, _ in given} == {
        tuple(trainer._tokenizer(text)["input_ids"]) for text in TEXTS
    }
    shares = [len(rows) / len(completion) for (_, completion, _), (*_, rows) in zip(given, read, strict=True)]
    assert min(shares) < 0.7 < 1 == max(shares)
    assert all(any(i != j for i, j in rows.items()) for *_, rows in read if len(rows) > 1)


@pytest.mark.parametrize(
    ("loss", "positions", "reduction"),
    [
        *[(loss, "all", "rollout") for loss in REPRESENTATION_LOSSES],
        *[("normalized_mse", positions, "rollout") for positions in ("last=3", "first=4", "last")],
        ("normalized_mse", "last=5", "token"),
    ],
)
def test_loss_on_paired_rows(make, roll_out, gradient, bridge, loss, positions, reduction):
    """Both models read one rollout at a time, unpadded, each in its own tokens."""
    kind = {"positions": positions, "reduction": reduction}
    trainer = make(representation_loss=loss, **kind)
    batch = roll_out(trainer, 8)
    given = by_hand.rollouts(batch)
    read = readings(trainer, given)
    agree(trainer, gradient, batch, expected_loss(trainer, given, bridge, read, loss=loss, **kind))


@pytest.mark.parametrize("positions", ["all", "last=3", "first=2"])
def test_rows_without_a_partner_have_no_weight(make, roll_out, broken, positions):
    trainer = make([*TEXTS, broken], positions=positions)
    batch = roll_out(trainer, 12)
    given = by_hand.rollouts(batch)
    read = readings(trainer, given)
    for i, ((_, completion, _), (prompt, ids, rows)) in enumerate(zip(given, read, strict=True)):
        mask = batch["teacher_prompt_mask"][i].bool()
        assert batch["teacher_prompt_ids"][i][mask].tolist() == prompt
        mask = batch["teacher_completion_mask"][i].bool()
        assert batch["teacher_completion_ids"][i][mask].tolist() == ids
        paired = [row in rows for row in range(len(completion))]
        weighed = (batch["representation_weights"][i] > 0).nonzero()[:, 0].tolist()
        assert weighed == by_hand.chosen(paired, positions)
        assert [batch["teacher_rows"][i, row].item() for row in weighed] == [rows[row] for row in weighed]
    assert batch["representation_weights"].sum().item() == pytest.approx(1)


def test_invalid_utf8(make, roll_out, gradient, bridge, broken, unreadable):
    """Nothing is paired from the first invalid byte on; a rollout that starts with one has no row."""
    trainer = make([TEXTS[0], broken, unreadable])
    batch = roll_out(trainer, 8)
    given = by_hand.rollouts(batch)
    read = readings(trainer, given)
    numbers = {len(rows) for *_, rows in read}
    assert 0 in numbers and len(numbers) == 3
    agree(trainer, gradient, batch, expected_loss(trainer, given, bridge, read))


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"positions": "last=5"},
        {"positions": "first=4", "reduction": "token"},
        {"temperatures": (0.7, 1.3)},
    ],
    ids=str,
)
@pytest.mark.parametrize("chunk", [3, 1024])
def test_sampled_text(make, roll_out, gradient, kind, chunk):
    """Spans that are supervised in part have no weight; without a bridge, since no states are compared."""
    ours, theirs = kind.get("temperatures", (1, 1))
    trainer = make(
        bridge=None,
        representation_weight=0,
        output_loss="sampled_text",
        output_positions=kind.get("positions", "all"),
        reduction=kind.get("reduction", "rollout"),
        student_temperature=ours,
        teacher_temperature=theirs,
        output_chunk_size=chunk,
    )
    batch = roll_out(trainer, 8)
    given = by_hand.rollouts(batch)
    models = trainer.model, trainer.teacher.model
    expected = by_hand.text_loss(*models, given, readings(trainer, given), ends(trainer), **kind)
    agree(trainer, gradient, batch, expected)
    assert batch["output_weights"].sum().item() == pytest.approx(1)
    for model in models:  # log-probs cancel in the sum, and float32 products differ with their shape
        model.double()
    apart = pieces(batch, [[7, 2], [0, 4, 5], [1], [3, 6]])
    close(gradient(trainer, batch), gradient(trainer, *apart), tolerance=1e-12)


def shared_classes(trainer):
    """Student and teacher ids of every text that one token of both spells, from the vocabularies alone."""
    spelled = []
    for tokenizer in (trainer.processing_class, trainer.teacher.tokenizer):
        special = set(tokenizer.all_special_ids)
        own = {index: token for token, index in tokenizer.get_vocab().items() if index not in special}
        spelled.append({bytes(by_hand.BYTE_OF[c] for c in token): index for index, token in own.items()})
    ours, theirs = spelled
    return [(ours[piece], theirs[piece]) for piece in ours if piece in theirs]


def on_classes(logits, ids, ends):
    return torch.cat([logits[list(ids)], logits[list(ends)].logsumexp(-1, keepdim=True)])


@pytest.mark.parametrize(
    "kind",
    [
        {"output_loss": "top_k", "output_top_k": 4},
        {"output_loss": "top_k", "output_top_k": 4, "output_support": "union", "student_temperature": 0.7},
        {"output_loss": "full_vocab"},
    ],
    ids=str,
)
def test_tokens_that_both_have(make, roll_out, gradient, kind):
    """At rows that have read the same and before one token of both; their ends are one class."""
    trainer = make(bridge=None, representation_weight=0, output_chunk_size=3, **kind)
    batch = roll_out(trainer, 8)
    given = by_hand.rollouts(batch)
    stops = [trainer.eos_token_ids, [trainer.teacher.tokenizer.eos_token_id]]
    pairs = [(i, j) for i, j in shared_classes(trainer) if i not in stops[0] and j not in stops[1]]
    ours, theirs = ([pair[side] for pair in pairs] for side in (0, 1))
    values, supervised = [], 0
    for (prompt, completion, _), (other, ids, rows) in zip(given, readings(trainer, given), strict=True):
        s = by_hand.states_and_logits(trainer.model, prompt, completion)[1]
        with torch.no_grad():
            t = by_hand.states_and_logits(trainer.teacher.model, other, ids)[1]
        strict = [
            (i, j)
            for i, j in sorted(rows.items())
            if (completion[i], ids[j]) in pairs or (completion[i] in stops[0] and ids[j] in stops[1])
        ]
        supervised += len(strict)
        values.append(
            [
                by_hand.output_row(
                    kind, on_classes(s[i], ours, stops[0]), on_classes(t[j], theirs, stops[1]), None
                )
                for i, j in strict
            ]
        )
    agree(trainer, gradient, batch, by_hand.reduce(values, "rollout"))
    assert 0 < supervised < sum(len(completion) for _, completion, _ in given)
    logged = trainer.update.averages.pop(lambda values: values)
    assert 0 < logged["output/student_shared_mass"] < 1 and 0 < logged["output/teacher_shared_mass"] < 1


def test_sampled_text_beside_the_bridge(make, roll_out, gradient, bridge):
    trainer = make(output_loss="sampled_text", output_weight=0.3)
    batch = roll_out(trainer, 8)
    given = by_hand.rollouts(batch)
    read, models = readings(trainer, given), (trainer.model, trainer.teacher.model)
    text = by_hand.text_loss(*models, given, read, ends(trainer))
    agree(trainer, gradient, batch, expected_loss(trainer, given, bridge, read) + 0.3 * text)


def test_rollouts_that_end_with_another_eos(make, roll_out, tokenizer):
    """One that only the generation config lists: the last span has its loss, and no rollout is truncated."""
    text, other = TEXTS[0].removesuffix(END), tokenizer.pad_token_id
    trainer = make([[*tokenizer(text)["input_ids"], other]], output_loss="sampled_text")
    assert other not in trainer.eos_token_ids
    for ends in (trainer.eos_token_ids, [*trainer.eos_token_ids, other]):
        trainer.translation.aligner.student_ends = trainer.eos_token_ids = ends
        batch, together = roll_out(trainer, 4), other in ends
        assert batch["ends_together"].tolist() == [together] * 4
        assert (truncated_rollouts(batch, trainer.eos_token_ids) == (not together)).all()
        assert bool((batch["output_weights"][:, -1] > 0).all()) is together
        last = batch["teacher_completion_ids"][:, -1] == trainer.teacher.tokenizer.eos_token_id
        assert bool(last.all()) is together


def test_the_ends_of_rollouts_come_from_one_place(make_trainer, student, tmp_path, tokenizer):
    """The EOS, what the generation config lists, the template's end of turn, and `generation_kwargs`."""
    folder = tmp_path / "base"
    model = AutoModelForCausalLM.from_pretrained(student)
    model.generation_config.eos_token_id = [tokenizer.pad_token_id, 9]
    model.save_pretrained(folder)
    base = copy.deepcopy(tokenizer)
    base.eos_token = tokenizer.pad_token
    base.save_pretrained(folder)
    for given, more in ({}, []), ({"eos_token_id": [11]}, [11]):
        trainer = make_trainer(student=str(folder), teacher=str(folder), generation_kwargs=given)
        wanted = {tokenizer.pad_token_id, tokenizer.eos_token_id, 9, *more}
        assert set(trainer.eos_token_ids) == wanted and len(trainer.eos_token_ids) == len(wanted)
        assert trainer.generation_config.eos_token_id == trainer.eos_token_ids
        assert trainer.generation_kwargs["eos_token_id"] == trainer.eos_token_ids


def test_invalid_utf8_and_sampled_text(make, roll_out, gradient, broken, unreadable):
    """The span that the first invalid byte breaks off has no end, so it has no weight."""
    trainer = make([TEXTS[0], broken, unreadable], output_loss="sampled_text")
    batch = roll_out(trainer, 8)
    for i, (_, completion, _) in enumerate(by_hand.rollouts(batch)):
        ids, rows = by_hand.translated(trainer._tokenizer, trainer.teacher.tokenizer, completion)
        spans = by_hand.text_spans(completion, ids, rows, ends(trainer))
        weighed = (batch["output_weights"][i] > 0).nonzero()[:, 0].tolist()
        assert weighed == [row for span, _ in spans for row in span]
    _, given = gradient(trainer, batch)
    assert torch.isfinite(given).all() and given.norm() > 0


def test_micro_batches_and_order(make, roll_out, gradient, broken):
    trainer = make([*TEXTS, broken])
    batch = roll_out(trainer)
    for splits in ([[0], [1], [2], [3], [4], [5]], [[5, 3, 1], [4, 2, 0]]):
        close(gradient(trainer, batch), gradient(trainer, *pieces(batch, splits)))


def test_accumulated_steps_of_a_run(make):
    runs = []
    for per_device in (4, 1):
        accumulation = {"gradient_accumulation_steps": 4 // per_device}
        trainer = make(per_device_train_batch_size=per_device, optim="sgd", max_steps=3, **accumulation)
        trainer.train()
        runs.append([e["loss/total"] for e in trainer.state.log_history if "loss/total" in e])
    assert len(runs[0]) == 3 and runs[0] == pytest.approx(runs[1], rel=1e-5)


def test_what_a_run_logs(make, tmp_path, broken, caplog):
    """Of all rows the share that is paired, and how many rollouts hold invalid UTF-8."""
    keys = {"per_device_train_batch_size": 8, "max_steps": 2, "output_loss": "sampled_text"}
    trainer = make([TEXTS[0], broken], **keys)
    kept, weigh = [], trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda rows: kept.append(weigh(rows)) or kept[-1]
    trainer.train()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    for batch, record in zip(kept, map(json.loads, lines), strict=True):
        given = by_hand.rollouts(batch)
        read = readings(trainer, given)
        invalid = sum(completion == broken for _, completion, _ in given)
        assert 0 < invalid < 8 and record["rollout/invalid_utf8"] == invalid
        paired = sum(len(rows) for *_, rows in read)
        rows = sum(len(completion) for _, completion, _ in given)
        assert record["rollout/coverage"] == pytest.approx(paired / rows)
        assert record["rollout/representation_rows"] == paired
        written = [
            len(span)
            for (_, completion, _), (_, ids, pairs) in zip(given, read, strict=True)
            for span, _ in by_hand.text_spans(completion, ids, pairs, ends(trainer))
        ]
        assert 0 < record["rollout/output_rows"] == sum(written) < rows
    assert "are paired with the teacher" not in caplog.text


def test_few_pairs_are_said_once(make, broken, tokenizer, teacher_tokenizer, caplog):
    make([broken], max_steps=3).train()
    (said,) = [r.getMessage() for r in caplog.records if "are paired with the teacher" in r.getMessage()]
    _, rows = by_hand.translated(tokenizer, teacher_tokenizer, broken)
    assert 2 <= len(rows) < len(broken) / 2
    assert said.startswith(f"only {100 * len(rows) / len(broken):.0f}% of the student's rows are paired")


def test_no_pairs_are_refused(make, unreadable):
    trainer = make([unreadable])
    with pytest.raises(UserError, match=r"none but the first is paired.*coverage 0"):
        trainer.train()


def test_text_prompts_need_no_template(make, make_bridge, make_teacher, roll_out, gradient):
    bare = train_tokenizer(WORDS * 9, vocab_size=300, design=designs.PAIRS)
    bare.chat_template = None
    teacher = make_teacher(bare)
    path = make_bridge(teacher)
    with pytest.raises(UserError, match="the teacher's tokenizer has no chat template"):
        chat = [{"role": role, "content": "7"} for role in ("system", "user")]
        make(teacher=teacher, bridge=path, dataset=Dataset.from_dict({"prompt": [chat] * 8}))
    trainer = make(teacher=teacher, bridge=path, dataset=Dataset.from_dict({"prompt": prompt_texts(8)}))
    batch = roll_out(trainer)
    given = by_hand.rollouts(batch)
    read = [
        (bare(text)["input_ids"], *by_hand.translated(trainer._tokenizer, bare, completion))
        for text, (_, completion, _) in zip(prompt_texts(6), given, strict=True)
    ]
    agree(trainer, gradient, batch, expected_loss(trainer, given, path, read))


@pytest.mark.parametrize("template", ["student", "own"])
def test_another_template_of_one_vocabulary(
    make, make_teacher, make_bridge, roll_out, gradient, tokenizer, tmp_path, template
):
    """Then the response's tokens are the student's, and all rows are paired."""
    teacher = make_teacher(tokenizer)
    other = AutoTokenizer.from_pretrained(teacher)
    other.chat_template = designs.PAIRS.chat_template.replace("<|end|>", END)
    other.save_pretrained(teacher)
    path = make_bridge(teacher, teacher_chat_template=template)
    trainer = make(teacher=teacher, bridge=path, teacher_chat_template=template)
    batch = roll_out(trainer)
    given = by_hand.rollouts(batch)
    read = ()
    if template == "own":
        texts = [f"<|user|>{text}{END}<|assistant|>" for text in prompt_texts(6)]
        read = [
            (tokenizer(text)["input_ids"], completion, {row: row for row in range(len(completion))})
            for text, (_, completion, _) in zip(texts, given, strict=True)
        ]
    agree(trainer, gradient, batch, expected_loss(trainer, given, path, read))


@pytest.mark.parametrize("template", ["student", "own"])
def test_students_ids_fed_to_the_teacher(make, make_bridge, roll_out, gradient, template):
    """The authors' way: ids that mean other tokens to the teacher; every row has a partner."""
    keys = {"teacher_tokenization": "student", "teacher_chat_template": template}
    path = make_bridge(**keys)
    trainer = make(bridge=path, **keys)
    batch = roll_out(trainer)
    given = by_hand.rollouts(batch)
    prompts = own_prompts(trainer.teacher.tokenizer, 6)
    read = [
        (prompt if template == "own" else same, completion, {row: row for row in range(len(completion))})
        for prompt, (same, completion, _) in zip(prompts, given, strict=True)
    ]
    assert "teacher_rows" not in batch and "teacher_completion_ids" not in batch
    agree(trainer, gradient, batch, expected_loss(trainer, given, path, read))


def test_diagnostics_without_a_shared_vocabulary(make, tmp_path):
    trainer = make(diagnostics_steps=1, representation_weight="0=1,1=0", max_steps=2)
    trainer.train()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    first, second = map(json.loads, lines)
    assert "loss/representation" in first and "loss/representation" not in second
    assert -1 < second["representation/cosine"] < 1
    assert not any(key.startswith("output/") for key in first.keys() | second.keys())


def test_evaluation(make, spell, bridge):
    data = Dataset.from_dict({"prompt": prompt_texts(8)})
    trainer = make(dataset=data, per_device_eval_batch_size=4, extra={"eval_dataset": data.select(range(4))})
    metrics = trainer.evaluate()
    ours, theirs = trainer._tokenizer, trainer.teacher.tokenizer
    prompts = [ours(text)["input_ids"] for text in prompt_texts(4)]
    completions = [spell(TEXTS)(prompt) for prompt in prompts]
    given = [(p, c, [True] * len(c)) for p, c in zip(prompts, completions, strict=True)]
    read = [
        (theirs(text)["input_ids"], *by_hand.translated(ours, theirs, completion))
        for text, completion in zip(prompt_texts(4), completions, strict=True)
    ]
    expected = expected_loss(trainer, given, bridge, read)
    assert metrics["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


# Refused


def test_ids_outside_the_teachers_vocabulary(make, make_bridge, make_teacher, tokenizer):
    small = train_tokenizer(["a"], vocab_size=262, design=designs.PAIRS)
    assert len(small) < len(tokenizer)
    teacher = make_teacher(small)
    path = make_bridge(teacher, teacher_tokenization="student")
    with pytest.raises(UserError, match="vocabulary"):
        make(teacher=teacher, bridge=path, teacher_tokenization="student")


@pytest.mark.parametrize("loss", ["sampled_token", "top_k_authors"])
@pytest.mark.parametrize("keys", [{}, {"output_weight": "0=0,5=1"}], ids=str)
def test_output_losses_of_one_vocabulary(make, loss, keys):
    with pytest.raises(UserError, match=r"different vocabularies .*this output loss is not defined"):
        make(output_loss=loss, **keys)


@pytest.mark.parametrize("keys", [{}, {"teacher_tokenization": "student"}], ids=str)
def test_no_bridge(make, keys):
    with pytest.raises(UserError, match=r"a bridge"):
        make(bridge=None, **keys)


def test_tools(make, tokenizer):
    able = copy.deepcopy(tokenizer)
    able.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
    with pytest.raises(UserError, match="tools need a teacher with the student's tokenizer"):
        make(extra={"tools": [add], "processing_class": able})


def test_a_tokenizer_without_bytes(make, make_teacher, make_bridge):
    words = Tokenizer(models.WordLevel({"<eos>": 0, "<unk>": 1, "the": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    plain = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<unk>")
    plain.chat_template = designs.PAIRS.chat_template
    teacher = make_teacher(plain, vocab_size=300)
    with pytest.raises(UserError, match=r"teacher's tokenizer .* does not give its tokens' bytes back"):
        make(teacher=teacher, bridge=make_bridge(teacher))


def test_models_as_objects(make, student, teacher, roll_out, gradient):
    """A teacher given as a model finds its tokenizer by its name."""
    named, load = make(), AutoModelForCausalLM.from_pretrained
    objects = make(student=load(student), teacher=load(teacher))
    batch = roll_out(named)
    assert gradient(named, batch)[0] == gradient(objects, batch)[0] > 0
