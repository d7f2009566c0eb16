"""What the teacher reads, where it comes from, and which pairs and settings are refused before a run."""

import copy
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import is_bitsandbytes_available, is_liger_kernel_available

import by_hand
from oprd.foundation.errors import UserError
from oprd.models.tiny.tokenizer import train_tokenizer
from oprd.training.config import OPRDConfig
from oprd.training.trainer import OPRDTrainer
from tiny_pair import prompt_texts
from updates import agree

TEMPLATE = (
    "{%- if hint is defined -%}{{- 'Hint: ' + hint + ' ' -}}{%- endif -%}"
    "{%- for message in messages -%}{{- message['role'] + ': ' + message['content'] + ' ' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'reply:' -}}{%- endif -%}"
)
PAIRS = [(1, 1), (2, 2)]


@pytest.fixture
def own_teacher(teacher, tokenizer, tmp_path):
    """The teacher with a chat template of its own."""
    folder = tmp_path / "own_teacher"
    AutoModelForCausalLM.from_pretrained(teacher).save_pretrained(folder)
    own = AutoTokenizer.from_pretrained(teacher)
    own.chat_template = TEMPLATE
    own.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("hint", [None, "seven"])
@pytest.mark.parametrize("terms", [{}, {"representation_weight": "0", "output_loss": "full_vocab"}], ids=str)
def test_a_teacher_reads_its_own_template(make_trainer, roll_out, gradient, own_teacher, hint, terms):
    kwargs = {"teacher_chat_template_kwargs": {"hint": hint}} if hint else {}
    trainer = make_trainer(teacher=own_teacher, teacher_chat_template="own", **kwargs, **terms)
    batch = roll_out(trainer)
    given = by_hand.rollouts(batch)
    start = f"Hint: {hint} " if hint else ""
    texts = [f"{start}user: {text} reply:" for text in prompt_texts(6)]
    prompts = [trainer.teacher.tokenizer(text)["input_ids"] for text in texts]
    assert len({len(prompt) for prompt in prompts}) > 1
    models = trainer.model, trainer.teacher.model
    if terms:
        expected = by_hand.output_loss(*models, given, terms, teacher_prompts=prompts)
        plain = by_hand.output_loss(*models, given, terms)
    else:
        expected = by_hand.representation_loss(*models, given, PAIRS, teacher_prompts=prompts)
        plain = by_hand.representation_loss(*models, given, PAIRS)
    assert gradient(trainer, batch)[0] == pytest.approx(expected.item(), rel=1e-5)
    assert abs(expected.item() - plain.item()) > 1e-3 * plain.item()


def test_the_students_template_with_other_arguments(make_trainer, roll_out, gradient, tokenizer):
    import copy

    hinted = copy.deepcopy(tokenizer)
    hinted.chat_template = TEMPLATE
    trainer = make_trainer(
        chat_template_kwargs={"hint": "one"},
        teacher_chat_template_kwargs={"hint": "forty-two"},
        extra={"processing_class": hinted},
    )
    batch = roll_out(trainer)
    given = by_hand.rollouts(batch)
    text = prompt_texts(1)[0]
    assert given[0][0] == hinted(f"Hint: one user: {text} reply:")["input_ids"]
    prompts = [hinted(f"Hint: forty-two user: {text} reply:")["input_ids"] for text in prompt_texts(6)]
    models = trainer.model, trainer.teacher.model
    expected = by_hand.representation_loss(*models, given, PAIRS, teacher_prompts=prompts)
    assert gradient(trainer, batch)[0] == pytest.approx(expected.item(), rel=1e-5)


def test_by_default_the_teacher_reads_the_students_ids(make_trainer, roll_out, own_teacher):
    batch = roll_out(make_trainer(teacher=own_teacher))
    assert not any(key.startswith("teacher_prompt") for key in batch)


def test_a_run_with_an_own_template(make_trainer, own_teacher):
    trainer = make_trainer(
        teacher=own_teacher,
        teacher_chat_template="own",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        output_loss="top_k",
    )
    trainer.train()
    assert trainer.state.global_step == 2


def test_models_as_objects_or_names(make_trainer, roll_out, gradient, student, teacher):
    named = make_trainer()
    load = AutoModelForCausalLM.from_pretrained
    objects = make_trainer(student=load(student), teacher=load(teacher))
    assert not any(p.requires_grad for p in objects.teacher.model.parameters())
    assert not objects.teacher.model.training
    batch = roll_out(named)
    assert gradient(named, batch)[0] == gradient(objects, batch)[0] > 0


@pytest.mark.parametrize("terms", [{}, {"representation_weight": "0", "output_loss": "full_vocab"}], ids=str)
def test_one_object_for_both(make_trainer, roll_out, gradient, student, terms):
    """The student itself as its teacher: still trainable, and at first equal to it."""
    model = AutoModelForCausalLM.from_pretrained(student)
    trainer = make_trainer(student=model, teacher=model, **terms)
    assert trainer.model.model.layers[0].mlp.up_proj.weight.requires_grad
    loss = gradient(trainer, roll_out(trainer))[0]
    assert abs(loss) <= 1e-6
    frozen = [p.detach().clone() for p in trainer.teacher.model.parameters()]
    trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(trainer.teacher.model.parameters(), frozen, strict=True))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("teacher_model_init_kwargs", {"dtype": "bfloat16"}),
        ("teacher_model_revision", "v2"),
        ("teacher_quantization", "8bit"),
    ],
)
def test_a_teacher_object_was_loaded_already(make_trainer, teacher, key, value):
    model = AutoModelForCausalLM.from_pretrained(teacher)
    with pytest.raises(UserError, match=f"{key} says how the teacher is loaded.*give the teacher as a name"):
        make_trainer(teacher=model, **{key: value})


def test_how_the_student_is_loaded(make_trainer, teacher):
    """In float32 unless told, and the config keeps what it was told."""
    assert make_trainer().model.dtype is torch.float32
    trainer = make_trainer(model_init_kwargs={"dtype": "bfloat16"})
    assert trainer.model.dtype is torch.bfloat16
    assert trainer.args.model_init_kwargs == {"dtype": "bfloat16"}
    assert trainer.processing_class.truncation_side == trainer.processing_class.padding_side == "left"


def test_bundled_names(make_trainer):
    trainer = make_trainer(student="tiny:student", teacher="tiny:teacher")
    assert trainer.teacher.num_layers == len(trainer.model.model.layers)


def test_teacher_from_the_config(make_trainer, teacher):
    trainer = make_trainer(teacher=None, teacher_model_name_or_path=teacher)
    assert trainer.teacher.model.config._name_or_path == teacher


def test_teacher_placed_by_a_device_map(make_trainer, roll_out, gradient):
    """A teacher dispatched by accelerate (here to the CPU and to disk) gives the plain one's loss."""
    plain = make_trainer()
    batch = roll_out(plain)
    placed = make_trainer(teacher_model_init_kwargs={"device_map": "cpu"})
    assert gradient(placed, batch)[0] == gradient(plain, batch)[0]


def test_teacher_offloaded_to_disk(make_trainer, roll_out, gradient, tmp_path):
    plain = make_trainer(output_loss="full_vocab", output_weight="0.1")
    batch = roll_out(plain)
    devices = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    devices |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    kwargs = {"device_map": devices, "offload_folder": str(tmp_path / "offload")}
    offloaded = make_trainer(teacher_model_init_kwargs=kwargs, output_loss="full_vocab", output_weight="0.1")
    assert gradient(offloaded, batch)[0] == pytest.approx(gradient(plain, batch)[0], rel=1e-6)


def test_vocabularies_padded_to_other_sizes_share_their_prefix(
    make_trainer, make_folder, roll_out, tokenizer
):
    padded = make_folder(2, vocab_size=len(tokenizer) + 6)
    trainer = make_trainer(teacher=padded, output_loss="full_vocab")
    assert trainer.update.output.vocabulary == len(tokenizer)
    assert trainer.compute_loss(trainer.model, roll_out(trainer)).isfinite()


def test_ids_that_only_the_students_padding_has(make_trainer, make_folder, roll_out, gradient, tokenizer):
    """Rows from the first such id on are left out, and what it is changes nothing."""
    size = len(tokenizer)
    student = make_folder(1, vocab_size=size + 80)
    for keys in ({"output_loss": "sampled_token"}, {"output_loss": "none"}):
        trainer = make_trainer(student=student, **keys)
        batch = roll_out(trainer)
        after = (batch["completion_ids"] >= size).long().cummax(-1).values.bool()
        written = batch["completion_mask"].bool()
        assert (after & written).any() and (~after & written).any()
        for term in ("representation", "output"):
            assert ((batch[f"{term}_weights"] > 0) == (written & ~after)).all()
        other = batch | {"completion_ids": batch["completion_ids"].masked_fill(after, 5)}
        (value, given), (same, also) = gradient(trainer, batch), gradient(trainer, other)
        assert value == pytest.approx(same, rel=1e-6) and torch.allclose(given, also, atol=1e-7)


# Refused


@pytest.fixture
def other_vocabulary(teacher, tmp_path):
    folder = tmp_path / "other_vocabulary"
    AutoModelForCausalLM.from_pretrained(teacher).save_pretrained(folder)
    train_tokenizer(["entirely different words for every merge"] * 9, vocab_size=270).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("loss", ["none", "sampled_token"])
def test_another_vocabulary(make_trainer, other_vocabulary, loss):
    with pytest.raises(UserError, match=r"different vocabularies .* bridge"):
        make_trainer(teacher=other_vocabulary, output_loss=loss)


def test_another_width(make_trainer, make_folder):
    wide = make_folder(2, hidden_size=48)
    with pytest.raises(
        UserError, match=r"student is 32 wide and the teacher 48.*bridge.*representation_weight: 0"
    ):
        make_trainer(teacher=wide)
    trainer = make_trainer(
        teacher=wide, representation_weight="0", output_loss="sampled_token", diagnostics_steps=1
    )
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"teacher": "tiny:nonsense"}, "no bundled model tiny:nonsense; the bundled ones are tiny:"),
        ({"student": "tiny:nonsense"}, "no bundled model tiny:nonsense"),
        ({"teacher": "./nowhere"}, "the model folder ./nowhere does not exist"),
        ({"student": "/nowhere/model"}, "the model folder /nowhere/model does not exist"),
        ({"teacher": "/"}, "not a model folder: it holds no config.json"),
        ({"teacher": "nobody/no-such-model"}, "cannot load the model nobody/no-such-model"),
        ({"teacher": None}, "no teacher: set teacher_model_name_or_path"),
        ({"layers": "0"}, "layers='0': the student has layers 1 to 2"),
        ({"layers": "1,3"}, "layer 3 is not one of them"),
        ({"layers": "1=3"}, "the teacher has layers 1 to 2"),
        (
            {"output_loss": "top_k", "output_top_k": 300},
            "output_top_k is 300, but the vocabulary has \\d+ tokens",
        ),
        ({"output_loss": "top_k_authors", "output_top_k": 300}, "output_top_k is 300"),
        ({"dataset": Dataset.from_dict({"text": ["a"]})}, "no column 'prompt'; it has text"),
        ({"dataset": Dataset.from_dict({"prompt": []})}, "empty"),
        ({"dataset": [{"prompt": "a"}]}, "must be a datasets.Dataset, got list"),
        (
            {"dataset": Dataset.from_dict({"prompt": ["a", "b", "c"]})},
            "takes 4 prompts, and the dataset has 3",
        ),
    ],
    ids=str,
)
def test_refused_with_a_sentence(make_trainer, config, message):
    with pytest.raises(UserError, match=message):
        make_trainer(**config)


LONGER_CHATS = Dataset.from_dict(
    {"prompt": [[{"role": role, "content": text} for role in ("system", "user")] for text in prompt_texts(8)]}
)


def test_without_a_chat_template_a_question_is_its_text(make_trainer, roll_out, tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        make_trainer(extra={"processing_class": bare}, dataset=LONGER_CHATS)
    trainer = make_trainer(extra={"processing_class": bare})
    read = [prompt for prompt, *_ in by_hand.rollouts(roll_out(trainer))]
    assert read == [tokenizer(f"{text}\n")["input_ids"] for text in prompt_texts(6)]


def test_own_template_needs_a_tokenizer(make_trainer, teacher):
    model = AutoModelForCausalLM.from_pretrained(teacher)
    model.config._name_or_path = ""
    with pytest.raises(UserError, match="teacher_chat_template: own needs a tokenizer"):
        make_trainer(teacher=model, teacher_chat_template="own")
    make_trainer(teacher=model)


def test_own_template_has_to_exist(make_trainer, teacher, tmp_path):
    folder = tmp_path / "bare"
    AutoModelForCausalLM.from_pretrained(teacher).save_pretrained(folder)
    bare = AutoTokenizer.from_pretrained(teacher)
    bare.chat_template = None
    bare.save_pretrained(folder)
    with pytest.raises(UserError, match="the teacher's tokenizer has no chat template"):
        make_trainer(teacher=str(folder), teacher_chat_template="own", dataset=LONGER_CHATS)


@pytest.fixture
def with_ends(student, teacher, tmp_path):
    """`with_ends(name, token, listed)`: a copy of student or teacher whose tokenizer ends with that token."""

    def copy(name, token, listed):
        folder = tmp_path / name
        source = {"student": student, "teacher": teacher}[name]
        model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
        model.generation_config.eos_token_id = listed
        model.save_pretrained(folder)
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(token)
        tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", tokenizer.eos_token)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return copy


def test_one_set_of_ends_is_left_as_it_is(make_trainer, with_ends, caplog):
    trainer = make_trainer(student=with_ends("student", 2, [2, 0]), teacher=with_ends("teacher", 0, [0, 2]))
    assert trainer.ends == [] and set(trainer.eos_token_ids) == {0, 2}
    assert trainer.update.output.shared is None and "output losses take" not in caplog.text


@pytest.fixture
def base_and_chat(make_trainer, with_ends):
    """`base_and_chat(**keys)`: a trainer whose student ends with 2 and whose teacher ends with 0."""
    pair = {"student": with_ends("student", 2, [2]), "teacher": with_ends("teacher", 0, [0])}
    return lambda **keys: make_trainer(**pair, **keys)


def test_rollouts_end_where_either_model_does(base_and_chat, tmp_path, caplog):
    with caplog.at_level("INFO"):
        trainer = base_and_chat(max_steps=1)
    assert "the student ends a response with '<|im_end|>' and the teacher with '<|pad|>'" in caplog.text
    assert set(trainer.eos_token_ids) == set(trainer.generation_config.eos_token_id) == {0, 2}
    trainer.save_model(str(tmp_path / "saved"))
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert set(saved["eos_token_id"]) == {0, 2}  # so that what is trained is also measured


@pytest.mark.parametrize("output", ["sampled_token", "top_k", "full_vocab"])
@pytest.mark.parametrize("end", [0, 2])
def test_ends_of_both_models_are_one_token(base_and_chat, roll_out, gradient, output, end):
    """Against logits whose ends are summed by hand; a rollout may end with either."""
    kind = {"output_loss": output, "output_top_k": 4, "output_chunk_size": 3}
    trainer = base_and_chat(script=lambda ids: [11, 12, end], representation_weight="0", **kind)
    batch, values = roll_out(trainer), []
    vocabulary = trainer.model.config.vocab_size
    others = [i for i in range(vocabulary) if i not in (0, 2)]

    def summed(logits):
        return torch.cat([logits[:, others], logits[:, [0, 2]].logsumexp(-1, keepdim=True)], -1)

    for prompt, completion, _ in by_hand.rollouts(batch):
        s = summed(by_hand.states_and_logits(trainer.model, prompt, completion)[1])
        with torch.no_grad():
            t = summed(by_hand.states_and_logits(trainer.teacher.model, prompt, completion)[1])
        tokens = [others.index(i) if i in others else len(others) for i in completion]
        values.append([by_hand.output_row(kind, s[n], t[n], token) for n, token in enumerate(tokens)])
    agree(trainer, gradient, batch, by_hand.reduce(values, "rollout"))


def test_a_missing_tokenizer(make_trainer, student, tmp_path):
    folder = tmp_path / "no_tokenizer"
    AutoModelForCausalLM.from_pretrained(student).save_pretrained(folder)
    with pytest.raises(UserError, match="tokenizer"):
        make_trainer(student=str(folder))
    with pytest.raises(UserError, match="tokenizer"):
        make_trainer(teacher=str(folder))


def without_weights(folder, tmp_path, prefix):
    """A folder of the same model whose weights carry a prefix."""
    prefixed = Path(shutil.copytree(folder, tmp_path / "prefixed"))
    stored = load_file(prefixed / "model.safetensors")
    save_file({prefix + name: w for name, w in stored.items()}, prefixed / "model.safetensors")
    return str(prefixed)


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_weights_that_are_not_there(make_trainer, student, tmp_path, role):
    folder = without_weights(student, tmp_path, "policy.")
    with pytest.raises(UserError, match=r"prefixed lacks 25 of the model's 25 .*the prefix 'policy\.'"):
        make_trainer(**{role: folder})


def test_a_student_without_an_eos(make_trainer, student, tmp_path):
    folder = Path(shutil.copytree(student, tmp_path / "endless"))
    tokenizer = AutoTokenizer.from_pretrained(student)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match="no EOS token"):
        make_trainer(student=str(folder))


@pytest.mark.parametrize("name", ["wandb", "trackio", "nonsense"])
def test_a_tracker_that_is_not_there(make_trainer, name):
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    with pytest.raises(UserError, match=f"report_to: {name}: .*{name}.*; or set report_to: none"):
        make_trainer(report_to=[name], student="./nowhere")


def test_what_a_run_asks_for_beside_its_models(make_trainer, monkeypatch):
    """Told before the models are looked for."""
    if not is_liger_kernel_available():
        with pytest.raises(UserError, match="use_liger_kernel: true needs Liger: pip install liger-kernel"):
            make_trainer(use_liger_kernel=True, student="./nowhere")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"push_to_hub: true, and the Hub cannot be reached .*hf auth login"):
        make_trainer(push_to_hub=True, student="./nowhere")


def test_plain_use_of_the_class(student, teacher, dataset, tmp_path):
    args = OPRDConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, report_to="none")
    trainer = OPRDTrainer(student, teacher, args, dataset)
    assert trainer.update.layer_map.pairs == ((1, 1), (2, 2))
    assert torch.equal(trainer.model.lm_head.weight, trainer.model.get_output_embeddings().weight)


@pytest.mark.skipif(not is_bitsandbytes_available(), reason="bitsandbytes is not installed")
@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_a_quantised_teacher_reads_like_a_whole_one(make_trainer, make_folder, roll_out, kind):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 64}  # its CPU kernels take no odd ones
    models = {"student": make_folder(1, **sizes), "teacher": make_folder(2, **sizes)}
    losses = []
    for quantization in ("none", kind):
        keys = {"output_loss": "full_vocab", "representation_loss": "relative_mse"}
        trainer = make_trainer(teacher_quantization=quantization, **models, **keys)
        losses.append(trainer.compute_loss(trainer.model, roll_out(trainer)).item())
    layer = trainer.teacher.model.model.layers[0].mlp.up_proj
    assert layer.weight.dtype in (torch.int8, torch.uint8)
    assert losses[1] != losses[0] and losses[1] == pytest.approx(losses[0], rel=0.2)
    trainer.train()


@pytest.mark.skipif(is_bitsandbytes_available(), reason="bitsandbytes is installed")
def test_quantisation_without_bitsandbytes_is_refused(make_trainer):
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        make_trainer(teacher_quantization="4bit")


@pytest.mark.parametrize(("shift", "warns"), [("stranger", True), ("relative", False)])
def test_a_teacher_of_another_origin_is_told_at_step_1(
    make_trainer, make_folder, tokenizer, tmp_path, caplog, shift, warns
):
    teacher = make_folder(2)
    if shift == "stranger":
        torch.manual_seed(1)
        teacher = str(tmp_path / "stranger")
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(make_folder(2))).save_pretrained(teacher)
        tokenizer.save_pretrained(teacher)
    make_trainer(teacher=teacher, max_steps=1).train()
    assert ("step 1: student and teacher states have a mean cosine" in caplog.text) is warns
