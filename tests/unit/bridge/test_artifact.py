"""The bridge as a file and as two projections: exact, whole or not at all, and never filled in."""

import json
import resource
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from oprd.bridge import Bridge
from oprd.bridge.artifact import BRIDGE_FILE, TENSORS, Projector
from oprd.foundation.errors import UserError
from oprd.objective.selection import LayerMap

WIDTHS = {1: (6, 5, 3), 4: (6, 7, 4), 9: (8, 5, 3)}  # student layer: widths of student and teacher, rank
PAIRS = ((1, 2), (4, 3), (9, 2))


def make_bridge(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    projectors = {
        layer: Projector(dict(PAIRS)[layer], random(r, s), random(r), random(r, t), random(t))
        for layer, (s, t, r) in WIDTHS.items()
    }
    return Bridge(projectors, {"rank": 3, "student": {"name": "Schüler"}, "share": [1 / 3, None, 1e-300]})


def assert_same(actual, wanted):
    assert actual.layer_map == wanted.layer_map and actual.ranks == wanted.ranks
    assert actual.metadata == wanted.metadata
    for layer in wanted.projectors:
        for name in TENSORS:
            one, two = (getattr(bridge.projectors[layer], name) for bridge in (actual, wanted))
            assert one.dtype == two.dtype and torch.equal(one, two)


@pytest.fixture
def saved(tmp_path):
    """The file of a good bridge."""
    return make_bridge().save(tmp_path / "good.safetensors")


# Save and load


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("text", [str, lambda path: path], ids=["str", "Path"])
def test_file_and_folder(tmp_path, text, dtype):
    bridge = make_bridge(dtype=dtype)
    (tmp_path / "qwen3-1.7B").mkdir()
    for path, file in (
        ("a.safetensors", "a.safetensors"),
        ("new/b.st", "new/b.st"),
        ("folder", f"folder/{BRIDGE_FILE}"),
        ("deep/new/folder", f"deep/new/folder/{BRIDGE_FILE}"),
        ("qwen3-1.7B", f"qwen3-1.7B/{BRIDGE_FILE}"),
    ):
        assert bridge.save(text(tmp_path / path)) == tmp_path / file
        assert_same(Bridge.load(text(tmp_path / path)), bridge)
        assert_same(Bridge.load(tmp_path / file), bridge)
    assert not list(tmp_path.rglob("*partial*"))


def test_what_a_bridge_is(saved):
    bridge = Bridge.load(saved)
    assert bridge.layer_map == LayerMap(PAIRS)
    assert bridge.ranks == {1: 3, 4: 4, 9: 3}
    with safe_open(saved, framework="pt") as file:
        assert json.loads(file.metadata()["layer_map"]) == {"1": 2, "4": 3, "9": 2}
        assert len(list(file.keys())) == 3 * len(TENSORS)


def test_slices_can_be_saved(tmp_path):
    bridge = make_bridge().first(2)
    assert_same(Bridge.load(bridge.save(tmp_path)), bridge)
    projector = make_bridge().projectors[1]
    columns = Projector(2, projector.student[:, ::2], projector.offset, projector.teacher, projector.mean)
    assert_same(Bridge.load(Bridge({2: columns}).save(tmp_path)), Bridge({2: columns}))


def test_a_bridge_is_replaced_as_a_whole(tmp_path):
    old, new = make_bridge(0), make_bridge(1).first(2)
    old.save(tmp_path)
    reader = Bridge.load(tmp_path)
    new.save(tmp_path)
    assert_same(Bridge.load(tmp_path), new)
    assert_same(reader, old)


def test_a_failed_save_leaves_the_old_bridge_and_nothing_else(tmp_path):
    old = make_bridge()
    old.save(tmp_path)
    with pytest.raises(TypeError):
        Bridge(old.projectors, {"model": object()}).save(tmp_path)
    large = Projector(2, torch.randn(64, 512), torch.randn(64), torch.randn(64, 512), torch.randn(512))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, limits[1]))  # as on a full disk
    try:
        with pytest.raises(Exception, match=r"large|space"):
            Bridge({1: large}).save(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_same(Bridge.load(tmp_path), old)
    assert [path.name for path in tmp_path.iterdir()] == [BRIDGE_FILE]


def test_a_save_that_cannot_replace_leaves_nothing(tmp_path):
    (tmp_path / BRIDGE_FILE / "folder").mkdir(parents=True)
    with pytest.raises(OSError):
        make_bridge().save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [BRIDGE_FILE]


# Refusals on load


MISSING = ["", "missing", "missing.safetensors", "good.safetensors/inside", "x" * 300, "a\0b", "a\nb"]


@pytest.mark.parametrize("path", MISSING)
def test_a_missing_bridge_is_refused(saved, path):
    with pytest.raises(UserError, match=r"(?s)no bridge at .*oprd bridge"):
        Bridge.load(saved.parent / path)


def test_a_truncated_bridge_is_refused_at_any_length(saved):
    whole = saved.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for length in (0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(whole) // 2):
        saved.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"good\.safetensors is damaged"):
            Bridge.load(saved)
    for broken in (whole[:-1], whole + b"\0", b"not a safetensors file", whole[4:]):
        saved.write_bytes(broken)
        with pytest.raises(UserError, match=r"good\.safetensors is damaged"):
            Bridge.load(saved)


def test_a_changed_bridge_that_kept_its_size_is_refused(saved):
    """Wherever a bit has changed, but in the name of the checksum, or in what pads the header."""
    whole, good = saved.read_bytes(), Bridge.load(saved)
    header = 8 + int.from_bytes(whole[:8], "little")
    padding = whole[:header].rindex(b"}") + 1
    name = whole.index(b'"checksum"')
    harmless = {*range(name + 1, name + 9), *range(padding, header)}
    for place in (*range(0, header, 3), *range(header, len(whole), 97), len(whole) - 1):
        saved.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        if place in harmless:
            continue
        with pytest.raises(UserError, match=r"good\.safetensors"):
            Bridge.load(saved)
    saved.write_bytes(whole.replace(b'"checksum"', b'"checksun"'))
    assert Bridge.load(saved).metadata == good.metadata


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}, {"format": "oprd-bridge-999"}], ids=str)
def test_another_safetensors_file_is_refused(tmp_path, metadata):
    save_file({"weight": torch.ones(2, 2)}, tmp_path / BRIDGE_FILE, metadata=metadata)
    with pytest.raises(UserError, match="not a bridge"):
        Bridge.load(tmp_path)


def rewrite(file, tensors=None, **header):
    """The same file with other tensors or header; a header value of None is left out."""
    pairs = json.dumps({str(student): teacher for student, teacher in PAIRS})
    known = {"format": "oprd-bridge-1", "layer_map": pairs, "oprd": "{}"} | header
    kept = {key: value for key, value in known.items() if value is not None}
    save_file(load_file(file) if tensors is None else tensors, file, metadata=kept)


def test_rewriting_alone_does_no_harm(saved):
    rewrite(saved)
    assert Bridge.load(saved).layer_map.pairs == PAIRS


@pytest.mark.parametrize(
    "header",
    [
        {"layer_map": None},
        {"oprd": None},
        {"layer_map": "{"},
        {"layer_map": ""},
        {"oprd": "{'rank': 3}"},
        {"layer_map": "[[1, 2]]"},
        {"layer_map": '{"one": 2}'},
        {"layer_map": '{"1": null}'},
        {"layer_map": "{}"},
        {"layer_map": '{"1": 2, "2": 2}'},
        {"layer_map": '{"a":' * 5000},
        {"oprd": "[1]"},
        {"oprd": "null"},
        {"oprd": '{"layers": [1]}'},
        {"oprd": '{"layers": {"1": 2}}'},
        {"oprd": '{"student": "x"}'},
        {"oprd": '{"reading": 5}'},
        {"oprd": '{"a":' * 5000},
    ],
    ids=lambda header: str(header)[:40],
)
def test_a_header_that_says_something_else_is_refused(saved, header):
    rewrite(saved, **header)
    with pytest.raises(UserError, match=r"good\.safetensors"):
        Bridge.load(saved)


@pytest.mark.parametrize("layer", WIDTHS)
@pytest.mark.parametrize("name", TENSORS)
def test_missing_tensors_and_values_that_are_not_finite_are_refused(saved, name, layer):
    good = load_file(saved)
    for value in (float("nan"), float("inf")):
        tensors = {key: x.clone() for key, x in good.items()}
        tensors[f"{name}.{layer}"].view(-1)[-1] = value
        rewrite(saved, tensors)
        with pytest.raises(UserError, match=f"not finite at student layer {layer}"):
            Bridge.load(saved)
    rewrite(saved, {key: x for key, x in good.items() if key != f"{name}.{layer}"})
    with pytest.raises(UserError, match=rf"damaged.*{name}\.{layer}"):
        Bridge.load(saved)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("student", lambda x: x[1:]),
        ("student", lambda x: x[0]),
        ("student", lambda x: x[:, 0]),
        ("student", lambda x: x[:, None]),
        ("student", lambda x: x[0, 0]),
        ("student", lambda x: x[:0]),
        ("offset", lambda x: x[1:]),
        ("offset", lambda x: x[:, None]),
        ("offset", lambda x: x[0]),
        ("teacher", lambda x: x[1:]),
        ("teacher", lambda x: x[:, 1:]),
        ("teacher", lambda x: x[0]),
        ("teacher", lambda x: x.T),
        ("mean", lambda x: x[1:]),
        ("mean", lambda x: x[None]),
        ("mean", lambda x: x[0]),
    ],
)
def test_shapes_that_do_not_fit_are_refused(saved, name, change):
    tensors = load_file(saved)
    tensors[f"{name}.4"] = change(tensors[f"{name}.4"]).contiguous()
    rewrite(saved, tensors)
    with pytest.raises(UserError, match=r"damaged .*layer 4"):
        Bridge.load(saved)


def test_a_bridge_of_no_direction_is_refused(saved):
    tensors = load_file(saved)
    tensors |= {f"{name}.9": tensors[f"{name}.9"][:0].clone() for name in ("student", "offset", "teacher")}
    rewrite(saved, tensors)
    with pytest.raises(UserError, match="layer 9"):
        Bridge.load(saved)


def test_ranks_are_cut_but_never_invented(saved):
    whole = Bridge.load(saved)
    for rank in (1, 2, 3):
        cut = Bridge.load(saved, rank=rank)
        assert cut.ranks == {1: rank, 4: rank, 9: rank}
        for layer, projector in cut.projectors.items():
            assert torch.equal(projector.student, whole.projectors[layer].student[:rank])
            assert torch.equal(projector.offset, whole.projectors[layer].offset[:rank])
            assert torch.equal(projector.teacher, whole.projectors[layer].teacher[:rank])
            assert torch.equal(projector.mean, whole.projectors[layer].mean)
    with pytest.raises(UserError, match=r"rank 4.*stores 3 directions for student layer 1"):
        Bridge.load(saved, rank=4)
    for rank in (0, -1):
        with pytest.raises(UserError, match="rank 1 or more"):
            Bridge.load(saved, rank=rank)


# Projections

INPUTS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("stored", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", INPUTS, ids=str)
@pytest.mark.parametrize("num_rows", [0, 1, 7])
def test_projections(num_rows, dtype, stored):
    bridge = make_bridge(dtype=stored)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for layer, projector in bridge.projectors.items():
        p, b, q, mean = (getattr(projector, name).double().numpy() for name in TENSORS)
        torch.manual_seed(0)
        h, t = (torch.randn(num_rows, x.shape[1], dtype=torch.float64).to(dtype) for x in (p, q))
        actual = bridge.student(h, layer), bridge.teacher(t, layer)
        wanted = h.double().numpy() @ p.T + b, (t.double().numpy() - mean) @ q.T
        for one, two in zip(actual, wanted, strict=True):
            assert one.dtype == wide and one.shape == two.shape
            np.testing.assert_allclose(one, two, rtol=0, atol=1e-13 if wide == torch.float64 else 2e-6 * 8)


@pytest.mark.parametrize("dtype", INPUTS, ids=str)
def test_autocast_does_not_narrow_the_projections(dtype):
    bridge = make_bridge()
    h, t = torch.randn(33, 6, dtype=torch.float64).to(dtype), torch.randn(33, 7, dtype=torch.float64)
    plain = bridge.student(h, 4), bridge.teacher(t.to(dtype), 4)
    with torch.autocast("cpu", torch.bfloat16):
        cast = bridge.student(h, 4), bridge.teacher(t.to(dtype), 4)
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.bfloat16  # still on around it
    for one, two in zip(cast, plain, strict=True):
        assert one.dtype == two.dtype and torch.equal(one, two)


@pytest.mark.parametrize("dtype", INPUTS, ids=str)
def test_gradients_reach_the_student_and_no_projector(dtype):
    bridge = make_bridge()
    h = torch.randn(5, 6, dtype=torch.float64).to(dtype).requires_grad_()
    weights = torch.randn(5, 4, dtype=torch.float64)
    (bridge.student(h, 4) * weights).sum().backward()
    wanted = weights @ bridge.projectors[4].student
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
    assert h.grad.dtype == dtype
    np.testing.assert_allclose(h.grad.double(), wanted, rtol=tolerance, atol=tolerance)
    for name in TENSORS:
        tensor = getattr(bridge.projectors[4], name)
        assert not tensor.requires_grad and tensor.grad is None


def test_moving_keeps_the_bridge(saved):
    bridge = Bridge.load(saved)
    assert_same(bridge.to("cpu"), bridge)
    narrow = bridge.to("cpu", torch.float32)
    assert narrow.layer_map == bridge.layer_map and narrow.metadata == bridge.metadata
    assert all(getattr(narrow.projectors[9], name).dtype == torch.float32 for name in TENSORS)
    assert bridge.projectors[9].student.dtype == torch.float64


def test_an_unknown_layer_is_refused():
    bridge = make_bridge()
    for project in (bridge.student, bridge.teacher):
        with pytest.raises(UserError, match="student layer 2; it has 1, 4, 9"):
            project(torch.randn(3, 6), 2)


# Which layers


@pytest.mark.parametrize(
    ("spec", "pairs"),
    [
        ("all", PAIRS),
        (" all ", PAIRS),
        ("last", ((9, 2),)),
        ("4", ((4, 3),)),
        ("9,1", ((1, 2), (9, 2))),  # Eq. 11 would say 9=12
        ("every=4", None),
        ("odd", None),
        ("1=2,9=2", ((1, 2), (9, 2))),
        ("1, 9 = 2", ((1, 2), (9, 2))),
        ("4,9=2", ((4, 3), (9, 2))),
    ],
)
def test_selected_layers_keep_the_stored_teacher(spec, pairs):
    bridge = make_bridge()
    if pairs is None:
        with pytest.raises(UserError, match="no projector for student layer"):
            bridge.select(spec, 9, 12)
    else:
        assert bridge.select(spec, 9, 12).pairs == pairs


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("2", "no projector for student layer 2; it has 1, 4, 9"),
        ("1,2", "no projector for student layer 2"),
        ("5=3", "no projector for student layer 5"),
        ("1=3", "student layer 1 with teacher layer 3.*1=2"),
        ("4=3,9=12", "student layer 9 with teacher layer 12.*9=2"),
        ("10", "layers 1 to 9"),
        ("1=13", "layers 1 to 12"),
        ("foo", "cannot read"),
        ("", "cannot read"),
    ],
)
def test_layers_the_bridge_does_not_have_are_refused(spec, message):
    with pytest.raises(UserError, match=message):
        make_bridge().select(spec, 9, 12)


def test_selection_of_a_cut_bridge_is_that_of_the_whole():
    bridge = make_bridge()
    assert bridge.first(2).select("all", 9, 12) == bridge.layer_map
    reordered = replace(bridge, projectors=dict(reversed(bridge.projectors.items())))
    assert reordered.select("all", 9, 12).pairs == PAIRS
