"""The losses in float64 NumPy, written from the paper's equations: value [N] and gradient [N, ·].

The gradient is with respect to the student's rows or logits; quantities under a stop-gradient are
constants. Nothing here is shared with the package.
"""

import numpy as np

# Representation losses: s, t are [N, D].


def _norm(x):
    norm = np.sqrt((x**2).sum(-1, keepdims=True))
    return np.where(norm == 0, 1.0, norm)


def mse(s, t):
    """Eq. 6, one row: (1/D) ‖s − t‖²."""
    return ((s - t) ** 2).sum(-1) / s.shape[-1], 2 * (s - t) / s.shape[-1]


def normalized_mse(s, t):
    """Eq. 14 on unit vectors: ‖ŝ − t̂‖²."""
    unit_s, unit_t = s / _norm(s), t / _norm(t)
    radial = (unit_s * unit_t).sum(-1, keepdims=True) * unit_s
    return ((unit_s - unit_t) ** 2).sum(-1), -2 * (unit_t - radial) / _norm(s)


def cosine(s, t):
    """1 − cos(s, t), from the dot product (non-zero rows only)."""
    cos = (s * t).sum(-1, keepdims=True) / (_norm(s) * _norm(t))
    return 1 - cos[:, 0], -(t / _norm(t) - cos * s / _norm(s)) / _norm(s)


def relative_mse(s, t):
    """‖s − t‖² / ‖t‖²."""
    return ((s - t) ** 2).sum(-1) / _norm(t)[:, 0] ** 2, 2 * (s - t) / _norm(t) ** 2


def smooth_l1(s, t):
    """Mean over D of x²/2 where |x| < 1, else |x| − 1/2."""
    x = s - t
    huber = np.where(np.abs(x) < 1, x**2 / 2, np.abs(x) - 0.5)
    return huber.mean(-1), np.clip(x, -1, 1) / s.shape[-1]


# Output-space losses: z (student) and y (teacher) are logits [N, V].


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def entropy(z):
    log_p = log_softmax(z)
    return -(np.exp(log_p) * log_p).sum(-1)


def sampled_token(z, y, tokens):
    """Value Eq. 3, log p(ŷ) − log q(ŷ); gradient Eq. 19, that value times ∇ log p(ŷ) = e_ŷ − p."""
    rows = np.arange(len(z))
    log_p, log_q = log_softmax(z), log_softmax(y)
    value = log_p[rows, tokens] - log_q[rows, tokens]
    return value, value[:, None] * (np.eye(z.shape[-1])[tokens] - np.exp(log_p))


def sampled_reward(z, reward, tokens, baseline):
    """Value log p(ŷ) − r(ŷ), r [N, V] any reward; gradient that less the baseline, times ∇ log p(ŷ)."""
    rows = np.arange(len(z))
    log_p = log_softmax(z)
    value = log_p[rows, tokens] - reward[rows, tokens]
    return value, (value - baseline)[:, None] * (np.eye(z.shape[-1])[tokens] - np.exp(log_p))


def reverse_kl(z, y):
    """Eq. 4: Σ p log(p/q)."""
    log_p, log_q = log_softmax(z), log_softmax(y)
    p = np.exp(log_p)
    value = (p * (log_p - log_q)).sum(-1)
    return value, p * (log_p - log_q - value[:, None])


def forward_kl(z, y):
    """Σ q log(q/p)."""
    log_p, log_q = log_softmax(z), log_softmax(y)
    return (np.exp(log_q) * (log_q - log_p)).sum(-1), np.exp(log_p) - np.exp(log_q)


def jsd(z, y):
    """½ KL(p‖m) + ½ KL(q‖m), m = (p + q)/2; ∂/∂p is ½ log(p/m)."""
    log_p, log_q = log_softmax(z), log_softmax(y)
    p, q = np.exp(log_p), np.exp(log_q)
    log_m = np.logaddexp(log_p, log_q) - np.log(2)
    slope = (log_p - log_m) / 2
    value = (p * (log_p - log_m) + q * (log_q - log_m)).sum(-1) / 2
    return value, p * (slope - (p * slope).sum(-1, keepdims=True))


def supports(z, y, k, support):
    """The support of every row as a python set."""
    tops = [[set(np.argsort(-row, kind="stable")[:k].tolist()) for row in logits] for logits in (z, y)]
    combine = {
        "student": lambda p, q: p,
        "teacher": lambda p, q: q,
        "union": set.union,
        "intersection": set.intersection,
    }
    return [combine[support](p, q) for p, q in zip(*tops, strict=True)]


def _per_row(row_loss, z, y, k, support):
    values, gradients = np.zeros(len(z)), np.zeros_like(z)
    for n, members in enumerate(supports(z, y, k, support)):
        if members:
            values[n], gradients[n] = row_loss(z[n], y[n], sorted(members))
    return values, gradients


def top_k(z, y, k, support="student"):
    """Eq. 5: KL between p and q, both renormalised on S."""

    def row(z, y, members):
        gradient = np.zeros_like(z)
        value, inside = reverse_kl(z[None, members], y[None, members])
        gradient[members] = inside[0]
        return value[0], gradient

    return _per_row(row, z, y, k, support)


def truncated_top_k(z, y, k, support="student"):
    """§4.1.1: Σ_{v∈S} p(v) [log p(v) − log q(v)], differentiated exactly (S held fixed)."""

    def row(z, y, members):
        log_p, log_q = log_softmax(z), log_softmax(y)
        p, inside = np.exp(log_p), np.zeros_like(z)
        inside[members] = 1
        slope = inside * (log_p - log_q + 1)
        return (inside * p * (log_p - log_q)).sum(), p * (slope - (p * slope).sum())

    return _per_row(row, z, y, k, support)


def top_k_authors(z, y, k, support="student"):
    """Σ_{v∈S} w(v) A(v), w the softmax over S of the student's log-probs; gradient Σ w(v) A(v) ∇ log p(v)."""

    def row(z, y, members):
        advantage = (log_softmax(z) - log_softmax(y))[members]
        weights = np.exp(log_softmax(log_softmax(z)[members]))
        slopes = np.eye(len(z))[members] - np.exp(log_softmax(z))
        return (weights * advantage).sum(), (weights * advantage) @ slopes

    return _per_row(row, z, y, k, support)


def central_differences(value, x, step=1e-6):
    """Gradient of `value(x).sum()` by central differences."""
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        shift = np.zeros_like(x)
        shift[index] = step
        gradient[index] = (value(x + shift) - value(x - shift)).sum() / (2 * step)
    return gradient
