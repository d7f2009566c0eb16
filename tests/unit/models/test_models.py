"""Models, tokenizers and adapters from files that somebody damaged, replaced or mixed up."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from oprd.foundation.errors import UserError
from oprd.models.loading import base_model, load_model, load_tokenizer, load_with_tokenizer, resolve_model

STUDENT = Path(resolve_model("tiny:student"))
DEEP = '{"a":' * 5000 + "1" + "}" * 5000
NORM = "model.norm.weight"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = "model.safetensors.index.json"

PANICS = {  # on every text, as its token is nowhere
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<nope>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [],
    "special_tokens": {},
}


class RunsCode:
    """What a pickle may hold; `touched` shows whether it was read as one."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


def read(folder):
    """What every command does first with the name of a model."""
    return load_with_tokenizer(str(folder), dtype="float32")


@pytest.fixture
def folder(tmp_path):
    """A copy of the bundled student."""
    return Path(shutil.copytree(STUDENT, tmp_path / "model"))


def write(name, content):
    def damage(folder):
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return damage


def cut(name, size):
    return lambda folder: os.truncate(folder / name, size)


def link(name, target="/nowhere/at/all"):
    def damage(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return damage


def values(name, **changes):
    """Other values in a JSON file."""

    def damage(folder):
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps(content | changes), encoding="utf-8")

    return damage


def weights(change):
    """Other weights: `change(weights)` gives them."""

    def damage(folder):
        path = folder / "model.safetensors"
        changed = {key: value.clone() for key, value in change(load_file(path)).items()}
        save_file(changed, path, metadata={"format": "pt"})

    return damage


def pickled(change, write=torch.save):
    """`change(weights)` as a pickle, in place of the weights."""

    def damage(folder):
        stored = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        write(change(stored), folder / "pytorch_model.bin")

    return damage


def sharded(change=lambda folder, index: index):
    """Two shards and their index, which `change(folder, index)` may alter."""

    def damage(folder):
        stored = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        places = {key: SHARDS[number % 2] for number, key in enumerate(sorted(stored))}
        for shard in SHARDS:
            part = {key: stored[key] for key, place in places.items() if place == shard}
            save_file(part, folder / shard, metadata={"format": "pt"})
        index = change(folder, {"metadata": {}, "weight_map": places})
        (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")

    return damage


def without(folder, index, shard):
    (folder / shard).unlink()
    return index


def in_another_type(dtype):
    return weights(lambda w: w | {NORM: torch.ones(128).to(dtype)})


BROKEN = {
    "empty": (write("model.safetensors", ""), "model.safetensors"),
    "cut header": (cut("model.safetensors", 4), "model.safetensors"),
    "cut": (cut("model.safetensors", 100_000), "model.safetensors"),
    "a page": (write("model.safetensors", "<html>404</html>" * 20), "model.safetensors"),
    "a pointer": (write("model.safetensors", "version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "dangling": (link("model.safetensors"), "model.safetensors .*a link to /nowhere"),
    "to itself": (link("model.safetensors", "model.safetensors"), "model.safetensors .*a link"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
    "misshapen": (weights(lambda w: w | {NORM: torch.ones(7)}), rf"{NORM} has the shape \[7\] .* \[128\]"),
    "a number": (weights(lambda w: w | {NORM: torch.tensor(1.0)}), rf"{NORM} has the shape \[\]"),
    "int64": (in_another_type(torch.int64), f"model.safetensors holds {NORM} as I64"),
    "float8": (in_another_type(torch.float8_e4m3fn), f"holds {NORM} as F8_E4M3"),
    "bool": (in_another_type(torch.bool), f"holds {NORM} as BOOL"),
    "empty pickle": (pickled(lambda w: b"", lambda content, path: path.write_bytes(content)), "_model.bin"),
    "a list": (pickled(lambda w: [1, 2]), "pytorch_model.bin .*no mapping of names to tensors"),
    "a tensor": (pickled(lambda w: w[NORM]), "pytorch_model.bin .*no mapping"),
    "nothing": (pickled(lambda w: None), "pytorch_model.bin .*no mapping"),
    "texts": (pickled(lambda w: dict.fromkeys(w, "x")), "pytorch_model.bin .*no mapping"),
    "numbered": (pickled(lambda w: dict(enumerate(w.values()))), "pytorch_model.bin .*no mapping"),
    "nested": (pickled(lambda w: {"state_dict": torch.ones(1)}), "lacks 47 .*such as state_dict"),
    "cut pickle": (
        lambda f: [pickled(lambda w: w)(f), cut("pytorch_model.bin", 9000)(f)],
        "pytorch_model.bin",
    ),
    "shard gone": (
        sharded(lambda f, i: without(f, i, SHARDS[1])),
        f"{INDEX} .*{SHARDS[1]}, which is not there",
    ),
    "shard cut": (lambda f: [sharded()(f), cut(SHARDS[0], 500)(f)], SHARDS[0]),
    "no map": (sharded(lambda f, i: {}), f"{INDEX} .*weight_map names no files"),
    "no metadata": (sharded(lambda f, i: {"weight_map": i["weight_map"]}), f"{INDEX} .*no object metadata"),
    "a list for a map": (sharded(lambda f, i: {"metadata": {}, "weight_map": [1]}), INDEX),
    "numbers for files": (sharded(lambda f, i: {"metadata": {}, "weight_map": {"a": 1}}), INDEX),
    "an empty map": (sharded(lambda f, i: {"metadata": {}, "weight_map": {}}), INDEX),
    "a config of null": (write("config.json", "null"), "config.json .*no JSON object"),
    "a config of a list": (write("config.json", "[1]"), "config.json .*no JSON object"),
    "an empty config": (write("config.json", ""), "config.json"),
    "half a config": (cut("config.json", 100), "config.json"),
    "a deep config": (write("config.json", DEEP), "config.json .*recursion"),
    "latin-1": (write("config.json", '{"model_type": "é"}'.encode("latin-1")), "config.json .*utf-8"),
    "a config of nothing": (write("config.json", "{}"), "config.json"),
    "no layers": (values("config.json", num_hidden_layers=-1), "num_hidden_layers"),
    "three heads": (values("config.json", num_attention_heads=3), "do not fit its config.json"),
    "no heads": (values("config.json", num_attention_heads=0), "config.json"),
    "no vocabulary": (values("config.json", vocab_size=0), "config.json"),
    "endless": (values("config.json", hidden_size=10**12), "do not fit its config.json"),
    "negative": (values("config.json", hidden_size=-8), "config.json"),
    "many layers": (values("config.json", num_hidden_layers=10**12), r"config\.json .*hidden_layers is 10"),
    "many labels": (values("config.json", num_labels=10**12), r"config\.json .*num_labels is 10"),
    "many, below": (values("config.json", text_config={"n_layer": 1e12}), r"config\.json .*n_layer is 10"),
    "of no kind": (values("config.json", model_type="nonsense"), "nonsense"),
    "a list for a kind": (values("config.json", model_type=[]), "config.json"),
    "no activation": (values("config.json", hidden_act="nope"), "'nope' .*config.json"),
    "no dtype": (values("config.json", dtype="nope"), "nope"),
    "an encoder": (write("config.json", '{"model_type": "clip"}'), "AutoModelForCausalLM"),
    "generation: a list": (write("generation_config.json", "[]"), "generation_config.json .*no JSON object"),
    "generation: empty": (write("generation_config.json", ""), "generation_config.json"),
    "generation: nowhere": (link("generation_config.json"), "generation_config.json .*a link"),
    "EOS: a word": (values("generation_config.json", eos_token_id="x"), "eos_token_id: 'x', .*no token id"),
    "EOS: endless": (values("generation_config.json", eos_token_id=[1, 10**30]), "eos_token_id.*no token id"),
    "beside the weights": (write("model-extra.safetensors", "xx"), "model-extra.safetensors"),
    "tokenizer: gone": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.*serialization file"),
    "tokenizer: empty": (write("tokenizer.json", ""), "tokenizer.json"),
    "tokenizer: null": (write("tokenizer.json", "null"), "tokenizer.json .*no JSON object"),
    "tokenizer: nothing": (write("tokenizer.json", "{}"), "the tokenizer of"),
    "tokenizer: deep": (write("tokenizer.json", DEEP), "tokenizer.json .*recursion"),
    "tokenizer: no kind": (values("tokenizer.json", model={"type": "Nope"}), "the tokenizer of"),
    "tokenizer: panics": (values("tokenizer.json", post_processor=PANICS), "tokenizer of .*it panicked"),
    "tokenizer: BERT's": (values("tokenizer_config.json", tokenizer_class="BertTokenizer"), "as 290 for"),
    "tokenizer: nowhere": (link("tokenizer_config.json"), "tokenizer_config.json .*a link"),
    "tokenizer: a list": (write("tokenizer_config.json", "[1]"), "tokenizer_config.json .*no JSON object"),
    "tokenizer: a class": (values("tokenizer_config.json", tokenizer_class=5), "the tokenizer of"),
    "tokenizer: a limit": (values("tokenizer_config.json", model_max_length="x"), "the tokenizer of"),
    "an EOS beyond": (values("tokenizer_config.json", eos_token="<nope>"), "no embedding for"),
    "template: no Jinja": (write("chat_template.jinja", "{% if %}"), "chat template is no Jinja"),
    "template: bytes": (write("chat_template.jinja", b"\xff\xfe\x00"), "chat_template.jinja .*utf-8"),
    "template: nowhere": (link("chat_template.jinja"), "chat_template.jinja .*a link"),
}


@pytest.mark.parametrize(("damage", "says"), BROKEN.values(), ids=list(BROKEN))
def test_a_damaged_file_is_named(folder, damage, says):
    damage(folder)
    with pytest.raises(UserError, match=says) as told:
        read(folder)
    line = str(told.value)
    assert str(folder) in line and "\n" not in line and len(line) < 800


@pytest.mark.parametrize("form", [pickled(lambda w: w), sharded(), values("config.json", architectures=None)])
def test_whole_files_of_any_form_give_the_same_model(folder, form):
    form(folder)
    found, wanted = read(folder)[0].state_dict(), load_model(str(STUDENT)).state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in found)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: {f"student.{key}": value for key, value in w.items()}, "47 of the model's 47.*'student.'"),
        (lambda w: {f"_orig_mod.{key}": value for key, value in w.items()}, "carry the prefix '_orig_mod.'"),
        (lambda w: {key: value for key, value in w.items() if key != NORM}, f"lacks 1 of .*: {NORM}$"),
        (lambda w: {"x": torch.ones(1)}, "47 of the model's 47 .*hold 1 others, such as x"),
        (lambda w: {key: value for key, value in w.items() if ".3." not in key}, "lacks 11 .*layers.3"),
    ],
)
def test_no_weight_is_drawn_at_random(folder, change, says):
    weights(change)(folder)
    with pytest.raises(UserError, match=says):
        read(folder)


def test_one_shard_in_the_place_of_another(folder):
    sharded()(folder)
    shutil.copy(folder / SHARDS[0], folder / SHARDS[1])
    with pytest.raises(UserError, match="lacks 23 of the model's 47 weights"):
        read(folder)


def test_a_tied_head_is_not_missing(tmp_path, tiny_model):
    model = tiny_model("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert torch.equal(load_model(str(tmp_path)).lm_head.weight, model.lm_head.weight)


def test_weights_that_the_model_has_not_are_told(folder, caplog):
    weights(lambda w: w | {"model.extra.weight": torch.ones(2)})(folder)
    read(folder)
    assert "holds 1 weights that the model has not: model.extra.weight" in caplog.text


def test_code_in_a_pickle_does_not_run(folder, tmp_path):
    pickled(lambda w: {"x": RunsCode(tmp_path / "ran")})(folder)
    with pytest.raises(UserError, match=r"pytorch_model\.bin .*no pickle of tensors alone"):
        read(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(RunsCode(tmp_path / "ran")))
    with pytest.raises(UserError, match=r"pytorch_model\.bin .*no pickle of tensors alone"):
        read(folder)
    assert not (tmp_path / "ran").exists()


FILES = sorted(path.name for path in STUDENT.iterdir() if path.suffix in (".json", ".safetensors", ".jinja"))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(FILES), content=st.binary(max_size=40) | JSON, keep=st.integers(0, 3000))
def test_whatever_a_file_holds_the_model_loads_or_is_refused(tmp_path, name, content, keep):
    folder = tmp_path / "model"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(STUDENT, folder)
    new = content if isinstance(content, bytes) else json.dumps(content).encode()
    (folder / name).write_bytes((folder / name).read_bytes()[:keep] + new)
    try:
        model, _ = read(folder)
    except UserError as error:
        assert str(folder) in str(error)
    else:
        wanted = load_model(str(STUDENT)).state_dict()
        assert all(torch.equal(value, wanted[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("", "'' names no model"),
        (" ", "names no model"),
        (5, "5 names no model"),
        ("a\0b", r"'a\\x00b' names no model"),
        ("/tmp/a\nb", "names no model"),
        ("x" * 300, "cannot load the model xxx"),
        ("/" + "x" * 300, "does not exist"),
        ("tiny:" + "x" * 300, "no bundled model"),
        ("tiny:../student", "no bundled model"),
        ("~nobody/model", "does not exist"),
    ],
)
def test_names_that_name_nothing(name, says):
    with pytest.raises(UserError, match=says):
        resolve_model(name)


def test_a_link_that_leads_nowhere(tmp_path):
    (tmp_path / "model").symlink_to("/nowhere")
    with pytest.raises(UserError, match="a link to /nowhere, and nothing is there"):
        resolve_model(str(tmp_path / "model"))


def test_a_folder_without_a_tokenizer(folder):
    for path in folder.glob("*token*"):
        path.unlink()
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizer(str(folder))


def test_tokens_beyond_the_embeddings(folder):
    """Ordinary ones are refused, and special ones that a chat uses; others only their own spelling gives."""
    model, tokenizer = read(folder)
    assert len(tokenizer) == model.get_input_embeddings().num_embeddings
    for added, special, template, fits in (
        ("<image>", True, "{{ messages }}", True),
        ("<image>", True, "{{ '<image>' }}", False),
        ("word", False, "{{ messages }}", False),
    ):
        _, tokenizer = read(STUDENT)
        tokenizer.add_tokens([added], special_tokens=special)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        if fits:
            read(folder)
            continue
        with pytest.raises(UserError, match=f"289 for '{added}'; it has 289"):
            read(folder)


# Adapters


@pytest.fixture(scope="module")
def made_adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    model = get_peft_model(load_model(str(STUDENT)), LoraConfig(r=2, target_modules=["q_proj"]))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(weight, 0.1)
    model.peft_config["default"].task_type = "CAUSAL_LM"
    model.save_pretrained(folder)
    load_tokenizer(str(STUDENT)).save_pretrained(folder)
    return folder


@pytest.fixture
def adapters(made_adapters, tmp_path):
    return Path(shutil.copytree(made_adapters, tmp_path / "adapters"))


def adapter_weights(change):
    def damage(folder):
        path = folder / "adapter_model.safetensors"
        save_file({key: value.clone() for key, value in change(load_file(path)).items()}, path)

    return damage


CONFIG = "adapter_config.json"
BROKEN_ADAPTERS = {
    "on themselves": (
        lambda f: values(CONFIG, base_model_name_or_path=str(f))(f),
        "leads back to these adapters",
    ),
    "on nothing": (values(CONFIG, base_model_name_or_path="/nowhere"), "/nowhere does not exist"),
    "on a number": (values(CONFIG, base_model_name_or_path=5), f"{CONFIG} names no model"),
    "of a revision": (values(CONFIG, revision=5), f"{CONFIG}: revision is 5"),
    "of no kind": (values(CONFIG, peft_type="NOPE"), f"NOPE.*{CONFIG}"),
    "for classes": (values(CONFIG, task_type="SEQ_CLS"), "SEQ_CLS"),
    "of another rank": (values(CONFIG, r=3), "size mismatch"),
    "of an endless rank": (values(CONFIG, r=10**12), "r is 1000000000000, and no weight .* wider than"),
    "of fewer modules": (values(CONFIG, target_modules=["v_proj"]), "lack 8 weights"),
    "of more modules": (values(CONFIG, target_modules=["q_proj", "v_proj"]), "lack 8 weights"),
    "a list": (write(CONFIG, "[1]"), f"{CONFIG} .*no JSON object"),
    "half": (adapter_weights(lambda w: {k: v for k, v in w.items() if "lora_A" in k}), "lack 4 weights"),
    "prefixed": (adapter_weights(lambda w: {f"x.{k}": v for k, v in w.items()}), "prefix 'x.'"),
    "too many": (
        adapter_weights(lambda w: w | {"base_model.model.model.norm.lora_A.weight": torch.ones(2, 2)}),
        "are of another model than .* no place for base_model.model.model.norm.lora_A",
    ),
    "gone": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors"),
    "cut": (cut("adapter_model.safetensors", 300), "adapter_model.safetensors"),
    "with a model": (lambda f: shutil.copy(STUDENT / "config.json", f), "keep each in a folder"),
}


@pytest.mark.parametrize(("damage", "says"), BROKEN_ADAPTERS.values(), ids=list(BROKEN_ADAPTERS))
def test_damaged_adapters_are_refused(adapters, damage, says):
    damage(adapters)
    with pytest.raises(UserError, match=says):
        read(adapters)


def test_adapters_on_adapters_add_up(adapters, made_adapters):
    values(CONFIG, base_model_name_or_path=str(made_adapters))(adapters)
    assert base_model(str(adapters)) == str(STUDENT)
    key = "model.layers.0.self_attn.q_proj.weight"
    bare, one, two = (load_model(str(f)).state_dict()[key] for f in (STUDENT, made_adapters, adapters))
    torch.testing.assert_close(two - bare, 2 * (one - bare), rtol=1e-4, atol=1e-6)
    assert not torch.equal(one, bare)
