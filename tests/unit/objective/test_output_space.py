"""Output-space losses against the float64 reference, in value and gradient."""

import math
from functools import partial

import numpy as np
import pytest
import torch

import reference_losses as reference
from oprd import output_space
from oprd.foundation.errors import UserError

SUPPORTS = ["student", "teacher", "union", "intersection"]
DIVERGENCES = ["reverse_kl", "forward_kl", "jsd"]
SHAPES = [(1, 1), (1, 33), (7, 33), (5, 2), (2, 4), (0, 33)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def losses_for(vocabulary):
    """Every loss by name, as (ours, reference): functions of student logits, teacher logits, tokens."""

    def dense(ours, theirs, **options):
        return lambda z, y, _: ours(z, y, **options), lambda z, y, _: theirs(z, y)

    named = {"sampled_token": (output_space.sampled_token, reference.sampled_token)}
    for name in DIVERGENCES:
        named[name] = dense(output_space.full_vocab, getattr(reference, name), divergence=name)
    for support in SUPPORTS:
        for k in sorted(k for k in {2, 5, vocabulary} if 2 <= k <= vocabulary):
            options = {"k": k, "support": support}
            for name, theirs, extra in [
                ("top_k", reference.top_k, {}),
                ("truncated_top_k", reference.truncated_top_k, {"renormalize": False}),
            ]:
                pair = dense(output_space.top_k, partial(theirs, **options), **options, **extra)
                named[f"{name}-{support}-{k}"] = pair
            pair = dense(output_space.top_k_authors, partial(reference.top_k_authors, **options), **options)
            named[f"top_k_authors-{support}-{k}"] = pair
        options = {"k": 1, "support": support}
        named[f"truncated_top_k-{support}-1"] = dense(
            output_space.top_k,
            partial(reference.truncated_top_k, **options),
            **options,
            renormalize=False,
        )
    return named


LOSSES = losses_for(33)


def make_logits(shape, dtype=torch.float64, scale=2.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in "pq")
    tokens = torch.randint(shape[1], shape[:1], generator=generator)
    return student.to(dtype).requires_grad_(), teacher.to(dtype).requires_grad_(), tokens


def run(loss, student, teacher, tokens):
    student.grad = None
    value = loss(student, teacher, tokens)
    value.sum().backward()
    return value.detach().double().numpy(), student.grad.double().numpy()


def expected(loss, *inputs):
    return loss(*(x.detach().double().numpy() if x.is_floating_point() else x.numpy() for x in inputs))


def assert_close(actual, wanted, tolerance, scale=1.0):
    scale = max(scale, np.abs(wanted).max(initial=0))
    np.testing.assert_allclose(actual, wanted, rtol=tolerance, atol=tolerance * scale)


# Value and gradient


@pytest.mark.parametrize("name", ["sampled_token", *DIVERGENCES, "top_k", "truncated_top_k", "top_k_authors"])
def test_reference_gradient_is_the_derivative_of_its_value(name):
    z, y, tokens = (x.detach().numpy() for x in make_logits((3, 6)))
    extra = [tokens] if name == "sampled_token" else [3] if "top_k" in name else []
    loss = partial(getattr(reference, name), **({"support": "union"} if "top_k" in name else {}))

    def value(live):
        if name == "sampled_token":  # Eq. 19: the advantage is a constant.
            return loss(z, y, tokens)[0] * reference.log_softmax(live)[np.arange(3), tokens]
        if name == "top_k_authors":
            total = 0
            for n, members in enumerate(reference.supports(z, y, 3, "union")):
                s = sorted(members)
                advantage = (reference.log_softmax(z[n]) - reference.log_softmax(y[n]))[s]
                weights = np.exp(reference.log_softmax(z[n, s]))  # both are constants
                total = total + (weights * advantage * reference.log_softmax(live[n])[s]).sum()
            return total
        return loss(live, y, *extra)[0]

    numeric = reference.central_differences(value, z)
    np.testing.assert_allclose(loss(z, y, *extra)[1], numeric, atol=1e-8)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradient(shape, dtype):
    student, teacher, tokens = make_logits(shape, dtype)
    for name, (ours, theirs) in losses_for(shape[1]).items():
        value, gradient = run(ours, student, teacher, tokens)
        wanted_value, wanted_gradient = expected(theirs, student, teacher, tokens)
        assert value.shape == shape[:1], name
        assert_close(value, wanted_value, TOLERANCE[dtype])
        assert_close(gradient, wanted_gradient, TOLERANCE[dtype])
        assert teacher.grad is None, name


def naive(name, student, teacher, tokens):
    """The formulas as one would type them, in the logits' own dtype."""
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    if name == "sampled_token":
        log_p, log_q = (x.gather(-1, tokens[:, None])[:, 0] for x in (log_p, log_q))
        advantage = (log_p - log_q).detach()
        return advantage + advantage * (log_p - log_p.detach())
    if name == "forward_kl":
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    if name == "jsd":
        log_m = ((log_p.exp() + log_q.exp()) / 2).log()
        return ((log_p.exp() * (log_p - log_m)).sum(-1) + (log_q.exp() * (log_q - log_m)).sum(-1)) / 2
    if name == "reverse_kl":
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    form, support, k = name.split("-")
    best = {"student": student, "teacher": teacher}[support].topk(int(k)).indices
    log_p, log_q = log_p.gather(-1, best), log_q.gather(-1, best)
    if form == "top_k":
        log_p, log_q = log_p.log_softmax(-1), log_q.log_softmax(-1)
    if form == "top_k_authors":
        weighed = (log_p.softmax(-1) * (log_p - log_q)).detach()
        return weighed.sum(-1) + (weighed * (log_p - log_p.detach())).sum(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@pytest.mark.parametrize(
    "name",
    ["sampled_token", *DIVERGENCES]
    + [f"{form}-{s}-5" for form in ("top_k", "truncated_top_k", "top_k_authors") for s in SUPPORTS[:2]],
)
def test_bfloat16_is_as_good_as_its_inputs(name):
    # Every row is a permutation of distinct values that bfloat16 represents, so that no support is a tie.
    generator = torch.Generator().manual_seed(0)
    grid = torch.arange(33) * 0.1875 - 3
    student, teacher = (
        torch.stack([grid[torch.randperm(33, generator=generator)] for _ in range(7)]).bfloat16()
        for _ in "pq"
    )
    tokens = torch.randint(33, (7,), generator=generator)
    ours, theirs = LOSSES[name]
    wanted_value, wanted_gradient = expected(theirs, student, teacher, tokens)
    naive_value, naive_gradient = run(partial(naive, name), student.requires_grad_(), teacher, tokens)
    value, gradient = run(ours, student, teacher, tokens)

    def worst(actual, wanted):
        return np.abs(actual - wanted).max()

    assert worst(value, wanted_value) <= 2 * worst(naive_value, wanted_value)
    assert worst(gradient, wanted_gradient) <= 2 * worst(naive_gradient, wanted_gradient)
    assert_close(value, wanted_value, 1e-5)  # Computed in float32; only the gradient is stored in bfloat16.
    np.testing.assert_allclose(gradient, wanted_gradient, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_large_logits(dtype):
    student, teacher, tokens = make_logits((7, 33), dtype, scale=1e4)
    with torch.no_grad():
        student[0, 0], teacher[0, 0], student[1, 1], teacher[1, 1] = 1e4, -1e4, -1e4, 1e4
    for ours, theirs in LOSSES.values():
        value, gradient = run(ours, student, teacher, tokens)
        wanted_value, wanted_gradient = expected(theirs, student, teacher, tokens)
        assert_close(value, wanted_value, TOLERANCE[dtype], scale=1e4)
        assert_close(gradient, wanted_gradient, TOLERANCE[dtype], scale=1e4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [0.0, 2.0, 1e4])
def test_equal_logits_give_zero(scale, dtype):
    student, _, tokens = make_logits((7, 33), dtype, scale)
    for name, (ours, _) in LOSSES.items():
        value, gradient = run(ours, student, student.detach().clone(), tokens)
        assert np.abs(value).max() <= 1e-6, name
        if not name.startswith("truncated"):  # Its derivative there is ∇ p(S), see the next test.
            assert np.abs(gradient).max() <= 1e-6, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
def test_equal_logits_leave_no_rounding(divergence, dtype):
    """An optimiser that divides by the gradient's size would make a step of it."""
    student, _, _ = make_logits((64, 500), dtype, 3.0)
    values = output_space.full_vocab(student, student.detach().clone(), divergence)
    (gradient,) = torch.autograd.grad(values.sum(), student)
    assert not values.any() and not gradient.any()


def test_truncated_sum_at_equal_logits_pushes_mass_out_of_the_support():
    """Σ_{v∈S} p (log p − log q) is zero at p = q, but its exact derivative there is ∇ Σ_{v∈S} p(v)."""
    student, _, tokens = make_logits((7, 33))
    _, gradient = run(LOSSES["truncated_top_k-student-5"][0], student, student.detach(), tokens)
    mass = student.softmax(-1).topk(5).values.sum()
    assert_close(gradient, torch.autograd.grad(mass, student)[0].numpy(), 1e-12)


@pytest.mark.parametrize(
    ("student", "teacher"), [((3, 4), (3, 5)), ((3, 4), (2, 4)), ((3, 4), (1, 4)), ((4,), (4,))]
)
def test_wrong_shapes_are_refused(student, teacher):
    student, teacher, tokens = torch.zeros(student), torch.zeros(teacher), torch.zeros(3, dtype=torch.long)
    for loss in (
        partial(output_space.sampled_token, tokens=tokens),
        output_space.full_vocab,
        partial(output_space.top_k, k=2),
        partial(output_space.top_k_authors, k=2),
    ):
        with pytest.raises(UserError, match="logits"):
            loss(student, teacher)


@pytest.mark.parametrize(("student", "teacher"), [((3, 4), (3, 5)), ((3, 4), (1, 4)), ((4,), (4,))])
def test_top_k_overlap_refuses_wrong_shapes(student, teacher):
    with pytest.raises(UserError, match="logits"):
        output_space.top_k_overlap(torch.zeros(student), torch.zeros(teacher), k=2)


@pytest.mark.parametrize("shape", [(2,), (4,), (3, 1), (0,), ()], ids=str)
def test_sampled_token_refuses_tokens_of_another_shape(shape):
    tokens = torch.zeros(shape, dtype=torch.long)
    with pytest.raises(UserError, match="token"):
        output_space.sampled_token(torch.zeros(3, 4), torch.zeros(3, 4), tokens)


# The sampled token (Eq. 3, Eq. 19)


def test_sampled_token_has_the_exact_gradient_in_expectation():
    vocabulary = 7
    student, teacher, _ = make_logits((1, vocabulary))
    p = student.detach().softmax(-1).numpy()[0]
    every_token = torch.arange(vocabulary)
    copies = student.detach().repeat(vocabulary, 1).requires_grad_()
    value, gradient = run(output_space.sampled_token, copies, teacher.repeat(vocabulary, 1), every_token)
    exact_value, exact_gradient = run(lambda z, y, _: output_space.full_vocab(z, y), student, teacher, None)
    np.testing.assert_allclose(p @ value, exact_value[0], rtol=1e-12)
    np.testing.assert_allclose(p @ gradient, exact_gradient[0], atol=1e-12)
    assert np.abs(exact_gradient).max() > 1e-2

    def plain(z, y, tokens):
        return (z.log_softmax(-1) - y.log_softmax(-1)).gather(-1, tokens[:, None])

    plain_value, plain_gradient = run(plain, copies, teacher.detach().repeat(vocabulary, 1), every_token)
    np.testing.assert_allclose(plain_value[:, 0], value, rtol=1e-12)
    np.testing.assert_allclose(p @ plain_gradient, 0, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 2), (7, 33), (0, 5)])
def test_a_baseline_is_taken_from_the_gradient_alone(shape):
    student, reward, tokens = make_logits(shape)  # of no distribution
    z, r = student.detach().numpy(), reward.detach().numpy()
    log_p = reference.log_softmax(z)
    expected = (np.exp(log_p) * (log_p - r)).sum(-1)
    baseline = output_space.kl_baseline(student, reward)
    np.testing.assert_allclose(baseline.numpy(), expected, rtol=1e-12)
    sampled = reward.detach().gather(-1, tokens[:, None]).squeeze(-1)
    value, gradient = run(
        lambda z, _, t: output_space.sampled_reward(z, sampled, t, baseline), student, reward, tokens
    )
    wanted_value, wanted = reference.sampled_reward(z, r, tokens.numpy(), expected)
    np.testing.assert_allclose(value, wanted_value, rtol=1e-12)
    np.testing.assert_allclose(gradient, wanted, atol=1e-12)


def test_the_kl_baseline_keeps_the_mean_gradient_and_mostly_lowers_its_variance():
    """Not always: a token's credit counts by the length of ∇ log p, which is short where p is large."""
    vocabulary, ratios = 33, []
    for seed in range(30):
        student, teacher, _ = make_logits((1, vocabulary), seed=seed)
        p, every_token = student.detach().softmax(-1).numpy()[0], torch.arange(vocabulary)
        log_q = teacher.detach().log_softmax(-1)
        moments = []
        for baseline in (None, output_space.kl_baseline(student, log_q).expand(vocabulary)):
            copies = student.detach().repeat(vocabulary, 1).requires_grad_()
            output_space.sampled_reward(copies, log_q[0], every_token, baseline).sum().backward()
            gradient = copies.grad.numpy()
            moments.append((p @ gradient, p @ ((gradient - p @ gradient) ** 2).sum(-1)))
        (mean, variance), (same, less) = moments
        np.testing.assert_allclose(same, mean, atol=1e-12)
        ratios.append(less / variance)
    assert np.median(ratios) < 0.7 and np.mean(np.array(ratios) < 1) > 0.9


# Sampled text: spans of several tokens


def by_span(log_p, log_q, student_spans, teacher_spans):
    """Value and the weight of every ∇ log p, span by span."""
    value, weight = np.zeros(len(log_p)), np.zeros(len(log_p))
    for span in set(student_spans):
        ours = [n for n, s in enumerate(student_spans) if s == span]
        teacher = sum(q for q, s in zip(log_q, teacher_spans, strict=True) if s == span)
        advantage = sum(log_p[n] for n in ours) - teacher
        value[ours] = [log_p[n] - teacher / len(ours) for n in ours]
        weight[ours] += advantage
        if (after := ours[-1] + 1) < len(log_p) and student_spans[after] == span + 1:
            weight[after] += advantage
    return value, weight


@pytest.mark.parametrize(
    ("student_spans", "teacher_spans"),
    [
        ([0, 0, 1, 2, 2, 2, 5, 6, 6], [0, 1, 1, 2, 2, 5, 6]),
        ([3], [3, 3]),
        ([4, 4, 7], [4, 7]),
        ([], []),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sampled_text_span_by_span(student_spans, teacher_spans, dtype):
    generator = torch.Generator().manual_seed(1)
    log_p, log_q = (-torch.rand(len(s), generator=generator).double() for s in (student_spans, teacher_spans))
    ours = log_p.to(dtype).requires_grad_()
    theirs = log_q.to(dtype).requires_grad_()
    spans = [torch.tensor(s, dtype=torch.long) for s in (student_spans, teacher_spans)]
    value = output_space.sampled_text(ours, theirs, *spans)
    wanted, weight = by_span(log_p.tolist(), log_q.tolist(), student_spans, teacher_spans)
    scale = torch.linspace(1, 2, len(ours), dtype=dtype)
    (value * scale).sum().backward()
    assert value.dtype == dtype and theirs.grad is None
    np.testing.assert_allclose(value.detach().double(), wanted, atol=TOLERANCE[dtype])
    np.testing.assert_allclose(ours.grad.double(), weight * scale.double().numpy(), atol=TOLERANCE[dtype])


def test_sampled_text_of_one_token_spans_is_the_sampled_token_in_expectation():
    """Two tokens from three, the second's distribution depending on the first; every outcome, weighed."""
    torch.manual_seed(0)
    first, second = torch.randn(3).double().requires_grad_(), torch.randn(3, 3).double().requires_grad_()
    q_first, q_second = torch.randn(3).double(), torch.randn(3, 3).double()
    expected = {"text": 0.0, "token": 0.0}
    for a in range(3):
        for b in range(3):
            tokens = torch.tensor([a, b])
            student, teacher = torch.stack([first, second[a]]), torch.stack([q_first, q_second[a]])
            log_p, log_q = output_space.log_probs(student, tokens), output_space.log_probs(teacher, tokens)
            chance = log_p.sum().detach().exp()
            text = output_space.sampled_text(log_p, log_q, torch.tensor([0, 1]), torch.tensor([0, 1]))
            token = output_space.sampled_token(student, teacher, tokens)
            torch.testing.assert_close(text, token, rtol=1e-12, atol=1e-12)
            expected["text"] += chance * text.sum()
            expected["token"] += chance * token.sum()
    text, token = (torch.autograd.grad(value, [first, second]) for value in expected.values())
    for ours, wanted in zip(text, token, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)
        assert wanted.abs().max() > 1e-2


def test_who_ends_a_number_too_early_answers_for_it():
    """To a teacher with tokens of two digits, `12` says at once that the number ends."""
    log_p = torch.tensor([-0.1, -0.1, -0.2], requires_grad=True)  # 1, 2, end
    value = output_space.sampled_text(
        log_p, torch.tensor([-9.0, -0.01]), torch.tensor([0, 0, 1]), torch.tensor([0, 1])
    )
    value.sum().backward()
    assert (log_p.grad > 8).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_log_probs(dtype):
    logits, _, tokens = make_logits((7, 33), dtype)
    values = output_space.log_probs(logits, tokens)
    wanted = reference.log_softmax(logits.detach().double().numpy())[np.arange(7), tokens]
    assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    np.testing.assert_allclose(
        values.detach().double(), wanted, atol=1e-5 if dtype != torch.float64 else 1e-12
    )


# Full vocabulary


def test_jsd_is_symmetric_and_at_most_ln_2():
    student, teacher, _ = make_logits((50, 9), scale=5)
    jsd = partial(output_space.full_vocab, divergence="jsd")
    value = jsd(student, teacher)
    assert torch.allclose(value, jsd(teacher, student), rtol=1e-12)
    assert ((value > 0) & (value <= math.log(2))).all()
    far = torch.eye(3, dtype=torch.float64) * 1e4
    assert torch.allclose(jsd(far, far.roll(1, 0)), torch.full((3,), math.log(2), dtype=torch.float64))


def test_forward_kl_is_reverse_kl_the_other_way_round():
    student, teacher, _ = make_logits((5, 9))
    forward = output_space.full_vocab(student, teacher, "forward_kl")
    assert torch.allclose(forward, output_space.full_vocab(teacher, student, "reverse_kl"), rtol=1e-12)
    assert torch.equal(
        output_space.full_vocab(student, teacher), output_space.full_vocab(student, teacher, "reverse_kl")
    )


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergences_ignore_a_constant_added_to_the_logits(divergence):
    student, teacher, _ = make_logits((5, 9))
    value = output_space.full_vocab(student, teacher, divergence)
    assert torch.allclose(value, output_space.full_vocab(student + 3, teacher - 5, divergence), rtol=1e-10)
    assert (value > 0).all()


def test_unknown_divergence_is_refused():
    with pytest.raises(UserError, match="kl_reverse"):
        output_space.full_vocab(torch.zeros(2, 3), torch.zeros(2, 3), "kl_reverse")


# Top-k


@pytest.mark.parametrize("support", SUPPORTS)
def test_top_k_of_the_whole_vocabulary_is_exact_reverse_kl(support):
    student, teacher, tokens = make_logits((7, 33))
    exact = run(LOSSES["reverse_kl"][0], student, teacher, tokens)
    for form in ("top_k", "truncated_top_k"):
        for whole, wanted in zip(
            run(LOSSES[f"{form}-{support}-33"][0], student, teacher, tokens), exact, strict=True
        ):
            np.testing.assert_allclose(whole, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("k", [1, 2, 5, 9])
def test_support_tokens_are_the_sets(k):
    student, teacher, _ = (x.detach() for x in make_logits((20, 9)))
    for support in SUPPORTS:
        tokens, members = output_space.support_tokens(student, teacher, k, support)
        assert tokens.shape == members.shape and members.dtype == torch.bool
        listed = [row[keep].tolist() for row, keep in zip(tokens, members, strict=True)]
        assert all(len(row) == len(set(row)) for row in listed)
        assert [set(row) for row in listed] == reference.supports(
            student.numpy(), teacher.numpy(), k, support
        )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("form", ["top_k", "truncated", "authors"])
def test_empty_intersection_is_zero(form, dtype):
    student = torch.tensor([[9.0, 8, 0, 0, 0], [9, 8, 7, 0, 0]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[0.0, 0, 0, 8, 9], [9, 0, 8, 0, 0]], dtype=dtype)
    loss = {
        "top_k": partial(output_space.top_k, k=2, support="intersection"),
        "truncated": partial(output_space.top_k, k=2, support="intersection", renormalize=False),
        "authors": partial(output_space.top_k_authors, k=2, support="intersection"),
    }[form]
    value, gradient = run(lambda z, y, _: loss(z, y), student, teacher, None)
    assert value[0] == 0 and (gradient[0] == 0).all()
    assert np.isfinite(value).all() and np.isfinite(gradient).all()
    assert (value[1] == 0) == (form == "top_k")  # One shared token: renormalised, it is certain.


def test_authors_form_is_eq_4_on_the_whole_vocabulary_and_eq_5_on_no_smaller_support():
    student, teacher, tokens = make_logits((7, 33))
    whole, part = (
        [
            run(LOSSES[f"{form}-student-{k}"][0], student, teacher, tokens)
            for form in ("top_k_authors", "top_k")
        ]
        for k in (33, 5)
    )
    for authors, paper in zip(*whole, strict=True):
        np.testing.assert_allclose(authors, paper, atol=1e-12)
    for authors, paper in zip(*part, strict=True):
        assert (np.abs(authors - paper).reshape(7, -1).max(-1) > 1e-3).all()


def test_authors_form_at_one_token_is_eq_19_there():
    student, teacher, _ = make_logits((7, 33))
    likeliest = student.detach().argmax(-1)
    ours = run(lambda z, y, _: output_space.top_k_authors(z, y, 1), student, teacher, None)
    sampled = run(output_space.sampled_token, student, teacher, likeliest)
    for one, other in zip(ours, sampled, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)


@pytest.mark.parametrize("k", [1, 0, -1, 5])
def test_bad_k_is_refused(k):
    with pytest.raises(UserError, match=f"k = {k}"):
        output_space.top_k(torch.zeros(2, 4), torch.zeros(2, 4), k)


@pytest.mark.parametrize("k", [0, 5])
@pytest.mark.parametrize("loss", [partial(output_space.top_k, renormalize=False), output_space.top_k_authors])
def test_other_top_k_losses_refuse_k_outside_the_vocabulary(loss, k):
    with pytest.raises(UserError, match=f"k = {k}"):
        loss(torch.zeros(2, 4), torch.zeros(2, 4), k)


@pytest.mark.parametrize("loss", [output_space.top_k, output_space.top_k_authors])
def test_unknown_support_is_refused(loss):
    with pytest.raises(UserError, match="union-intersection"):
        loss(torch.zeros(2, 4), torch.zeros(2, 4), 2, support="union-intersection")


# Metrics


def test_entropy():
    student, *_ = make_logits((7, 33))
    np.testing.assert_allclose(
        output_space.entropy(student), expected(reference.entropy, student), rtol=1e-12
    )
    half = output_space.entropy(student.detach().bfloat16())
    assert half.dtype == torch.float32
    np.testing.assert_allclose(half, expected(reference.entropy, student.bfloat16()), rtol=1e-5)
    assert torch.allclose(output_space.entropy(torch.zeros(2, 8)), torch.full((2,), math.log(8)))
    assert (output_space.entropy(torch.eye(3) * 1e4) == 0).all()
    assert not output_space.entropy(student).requires_grad


@pytest.mark.parametrize("k", [1, 4, 16, 33])
def test_top_k_overlap(k):
    student, teacher, _ = (x.detach() for x in make_logits((20, 33)))
    shared = reference.supports(student.numpy(), teacher.numpy(), k, "intersection")
    overlap = output_space.top_k_overlap(student, teacher, k)
    np.testing.assert_allclose(overlap, [len(row) / k for row in shared], rtol=1e-6)
    assert (output_space.top_k_overlap(student, student, k) == 1).all()


def test_top_k_overlap_of_a_small_vocabulary_is_one():
    student, teacher, _ = make_logits((3, 5))
    assert output_space.top_k_overlap(student, teacher).tolist() == [1.0, 1.0, 1.0]
