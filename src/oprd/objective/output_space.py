"""Output-space baselines (OPD): divergences of next-token distributions, one value per row.

Every function takes `student_logits[N, V]` and `teacher_logits[N, V]`, computes in float32 or wider
and lets no gradient reach the teacher. p is the student's distribution, q the teacher's.
"""

from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from oprd.foundation.errors import UserError

Support = Literal["student", "teacher", "union", "intersection"]
Divergence = Literal["reverse_kl", "forward_kl", "jsd"]
Logits = Float[Tensor, "N V"]
Rows = Float[Tensor, " N"]


def sampled_token(student_logits: Logits, teacher_logits: Logits, tokens: Int[Tensor, " N"]) -> Rows:
    """log p(ŷ) − log q(ŷ) at the sampled token (Eq. 3), with the score-function gradient (Eq. 19).

    The gradient is sg(log p − log q) · ∇ log p(ŷ), whose mean over ŷ ~ p is that of Eq. 2; the
    derivative of the value itself would have zero mean.
    """
    student_logits, teacher_logits = _wide(student_logits, teacher_logits)
    if tokens.shape != student_logits.shape[:1]:
        raise UserError(
            f"sampled_token wants one token per row: tokens has shape {tuple(tokens.shape)}, and there are "
            f"{len(student_logits)} rows of logits"
        )
    return sampled_reward(student_logits, log_probs(teacher_logits, tokens), tokens)


def sampled_reward(
    student_logits: Logits, log_q: Rows, tokens: Int[Tensor, " N"], baseline: Rows | None = None
) -> Rows:
    """`sampled_token` of a reward log q(ŷ) that is given, and need not be that of a distribution.

    The gradient is sg(log p − log q − `baseline`) · ∇ log p(ŷ). A baseline that does not depend on ŷ leaves
    its mean and its value as they are.
    """
    log_p = log_probs(student_logits, tokens)
    advantage = (log_p - log_q).detach()
    credit = advantage if baseline is None else advantage - baseline.to(advantage)
    return _with_gradient(advantage, credit, log_p)


@torch.no_grad()
def kl_baseline(student_logits: Logits, log_q: Logits) -> Rows:
    """Σ p (log p − log q): the mean over ŷ ~ p of what `sampled_reward` credits ŷ with (vOPD).

    `log_q` is the reward of every token. Without that mean the gradient mostly varies less (2605.07865).
    """
    log_p = student_logits.to(torch.promote_types(student_logits.dtype, torch.float32)).log_softmax(-1)
    return _dot(log_p.exp(), log_p - log_q.to(log_p))


def sampled_text(
    log_p: Float[Tensor, " N"],
    log_q: Float[Tensor, " M"],
    student_spans: Int[Tensor, " N"],
    teacher_spans: Int[Tensor, " M"],
) -> Rows:
    """Eq. 3 and 19 across tokenizers: log p − log q of the text that two models write in different tokens.

    A span is the text between two positions at which both have read the same. `*_spans` numbers that of every
    token, in order, consecutive where one follows on the other; `log_p`, `log_q` are the tokens'
    log-probabilities. The values of a span's student tokens sum to A = log p(span) − log q(span).

    The gradient is Σ A · ∇ log p over the span's tokens and the token after it. Only that token settles how
    the teacher tokenizes the span: the teacher's token `12` implies that no digit follows, so the token that
    ends the number shares the advantage. Where every span is one token, that part has zero mean, and the
    value is `sampled_token`'s.
    """
    num_spans = max([*student_spans.tolist(), *teacher_spans.tolist()], default=-1) + 1
    student_spans, teacher_spans = student_spans.to(log_p.device), teacher_spans.to(log_p.device)
    spans = log_p.detach().new_zeros(num_spans)
    teacher = spans.index_add(0, teacher_spans, log_q.detach().to(log_p))
    advantage = spans.index_add(0, student_spans, log_p.detach()) - teacher
    size = spans.index_add(0, student_spans, torch.ones_like(log_p.detach()))[student_spans]
    before = student_spans.roll(1)
    follows_on = student_spans == before + 1
    credit = advantage[student_spans] + torch.where(follows_on, advantage[before], 0)
    value = log_p.detach() - teacher[student_spans] / size
    return _with_gradient(value, credit, log_p)


def log_probs(logits: Logits, tokens: Int[Tensor, " N"]) -> Rows:
    """log-softmax of every row at its token, in float32 or wider."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return _log_probs_at(wide, tokens[:, None]).squeeze(-1)


def full_vocab(student_logits: Logits, teacher_logits: Logits, divergence: Divergence = "reverse_kl") -> Rows:
    """Divergence over the whole vocabulary, differentiated exactly.

    `reverse_kl` is Σ p log(p/q) (Eq. 4), `forward_kl` Σ q log(q/p), `jsd` ½KL(p‖m) + ½KL(q‖m) with
    m = (p + q)/2.
    """
    student_logits, teacher_logits = _wide(student_logits, teacher_logits)
    log_p, log_q = student_logits.detach().log_softmax(-1), teacher_logits.log_softmax(-1)
    p = log_p.exp()
    if divergence == "reverse_kl":
        gap = log_p.sub_(log_q)
        value = _dot(p, gap)
        return _with_gradient(value, p.mul_(gap.sub_(value[:, None])), student_logits)
    if divergence == "forward_kl":
        q = log_q.exp()
        value = _dot(q, log_q.sub_(log_p))
        return _with_gradient(value, p.sub_(q), student_logits)
    if divergence == "jsd":
        gap = log_p.sub_(log_q)
        shared = (
            gap.abs().neg_().expm1_().div_(2).log1p_()
        )  # log m − max(log p, log q), 0 where they are equal
        above = gap.clamp(max=0).sub_(shared)  # log p/m
        to_mean = _dot(p, above) / 2
        value = to_mean + _dot(log_q.exp(), gap.neg_().clamp_(max=0).sub_(shared)) / 2
        return _with_gradient(value, p.mul_(above.div_(2).sub_(to_mean[:, None])), student_logits)
    raise UserError(f"divergence={divergence!r} is not one of {', '.join(get_args(Divergence))}")


def top_k(
    student_logits: Logits,
    teacher_logits: Logits,
    k: int,
    support: Support = "student",
    renormalize: bool = True,
) -> Rows:
    """Reverse KL on a support S of likely tokens, differentiated through the live student.

    `renormalize=True` is Eq. 5: KL between p and q both renormalised on S; it is identically zero at
    k = 1, which is refused. `renormalize=False` is the truncated sum of §4.1.1,
    Σ_{v∈S} p(v) [log p(v) − log q(v)], whose gradient at p = q is ∇ Σ_{v∈S} p(v), not zero: mass leaves S.
    S is the top k of the student, of the teacher, their union or
    their intersection; a row whose intersection is empty has value zero.
    """
    _check_k(k, student_logits.shape[-1], renormalize)
    student_logits, teacher_logits = _wide(student_logits, teacher_logits)
    tokens, members = support_tokens(student_logits, teacher_logits, k, support)
    if renormalize:
        log_p = _log_softmax_on(student_logits.gather(-1, tokens), members)
        log_q = _log_softmax_on(teacher_logits.gather(-1, tokens), members)
    else:
        log_p, log_q = _log_probs_at(student_logits, tokens), _log_probs_at(teacher_logits, tokens)
    p = torch.where(members, log_p.detach().exp(), 0)
    gap = torch.where(members, log_p.detach() - log_q, 0)
    return _with_gradient((p * gap).sum(-1), p * gap if renormalize else p * (gap + 1), log_p)


def top_k_authors(
    student_logits: Logits, teacher_logits: Logits, k: int, support: Support = "student"
) -> Rows:
    """What the authors' code trains: the value Σ_{v∈S} w(v) A(v), the gradient Σ_{v∈S} w(v) A(v) ∇ log p(v).

    A = log p − log q, and w is the softmax of log p over S. Neither is differentiated: the gradient goes
    through log p over the whole vocabulary, like Eq. 19's, and equals that of Eq. 5 only if S = V.
    At k = 1 it pushes the likeliest token alone.
    """
    _check_k(k, student_logits.shape[-1], renormalize=False)
    student_logits, teacher_logits = _wide(student_logits, teacher_logits)
    tokens, members = support_tokens(student_logits, teacher_logits, k, support)
    log_p, log_q = _log_probs_at(student_logits, tokens), _log_probs_at(teacher_logits, tokens)
    weights = torch.where(members, _log_softmax_on(log_p.detach(), members).exp(), 0)
    weighed = weights * (log_p.detach() - log_q)
    return _with_gradient(weighed.sum(-1), weighed, log_p)


@torch.no_grad()
def support_tokens(
    student_logits: Logits, teacher_logits: Logits, k: int, support: Support
) -> tuple[Int[Tensor, "N S"], Bool[Tensor, "N S"]]:
    """Candidate token ids of every row and which of them belong to its support, none twice."""
    student_top = student_logits.topk(k, dim=-1).indices
    teacher_top = teacher_logits.topk(k, dim=-1).indices
    if support == "student":
        return student_top, torch.ones_like(student_top, dtype=torch.bool)
    if support == "teacher":
        return teacher_top, torch.ones_like(teacher_top, dtype=torch.bool)
    shared = (student_top[:, :, None] == teacher_top[:, None, :]).any(-1)
    if support == "intersection":
        return student_top, shared
    if support == "union":
        new = ~(teacher_top[:, :, None] == student_top[:, None, :]).any(-1)
        return torch.cat([student_top, teacher_top], -1), torch.cat([torch.ones_like(shared), new], -1)
    raise UserError(f"support={support!r} is not one of {', '.join(get_args(Support))}")


@torch.no_grad()
def entropy(logits: Logits) -> Rows:
    """Entropy −Σ p log p of every row, in nats."""
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


@torch.no_grad()
def top_k_overlap(student_logits: Logits, teacher_logits: Logits, k: int = 16) -> Rows:
    """|top-k(p) ∩ top-k(q)| / k of every row."""
    student_logits, teacher_logits = _wide(student_logits, teacher_logits)
    k = min(k, student_logits.shape[-1])
    return support_tokens(student_logits, teacher_logits, k, "intersection")[1].float().mean(-1)


def _dot(a: Logits, b: Logits) -> Rows:
    """Σ a · b of every row, without their product in memory."""
    return torch.einsum("nv,nv->n", a, b)


def _log_probs_at(logits: Tensor, tokens: Int[Tensor, "N S"]) -> Float[Tensor, "N S"]:
    return logits.log_softmax(-1).gather(-1, tokens)


def _wide(student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    if student_logits.ndim != 2 or student_logits.shape != teacher_logits.shape:
        raise UserError(
            f"student logits {tuple(student_logits.shape)} and teacher logits {tuple(teacher_logits.shape)} "
            "must have the same shape [rows, vocabulary]; output losses need one vocabulary"
        )
    dtype = torch.promote_types(
        torch.promote_types(student_logits.dtype, teacher_logits.dtype), torch.float32
    )
    return student_logits.to(dtype), teacher_logits.detach().to(student_logits.device, dtype)


class _ClosedForm(torch.autograd.Function):
    """A value per row whose gradient is known in closed form."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, slope: Tensor, at: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, Tensor]:
        (slope,) = ctx.saved_tensors
        return None, None, (grads[0] if slope.ndim == 1 else grads[0][:, None]) * slope


def _with_gradient(value: Rows, slope: Tensor, at: Tensor) -> Rows:
    """`value`, with the derivative `slope` with respect to `at`, row by row.

    A divergence's exact gradient can be written with slopes that vanish where p = q, so equal models get no
    gradient at all instead of the rounding of terms that should cancel.
    """
    return _ClosedForm.apply(value, slope, at)


def _log_softmax_on(values: Tensor, members: Tensor) -> Tensor:
    """log-softmax over the members of each row; finite, and of no consequence, elsewhere."""
    lowest = torch.finfo(values.dtype).min
    return values.masked_fill(~members, lowest).log_softmax(-1)


def _check_k(k: int, vocabulary: int, renormalize: bool) -> None:
    if not 1 <= k <= vocabulary:
        raise UserError(f"top-k needs 1 <= k <= {vocabulary}, the vocabulary; got k = {k}")
    if renormalize and k == 1:
        raise UserError(
            "a renormalised top-k loss is identically zero at k = 1: raise output_top_k, or set "
            "renormalize: false, or use sampled_token"
        )
