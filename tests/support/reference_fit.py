"""The bridge's fit in float64 NumPy on all rows at once, written from the paper; and rows to fit.

Nothing here is shared with the package, which never holds all rows.
"""

import itertools

import numpy as np


def make_rows(num_rows, student_width, teacher_width, seed=0, offset=1.0):
    """Student and teacher rows over common latents, each next direction smaller and harder to predict."""
    rng = np.random.default_rng(seed)
    width = max(student_width, teacher_width)
    latent = rng.normal(size=(num_rows, width))
    noise = rng.normal(size=(num_rows, width)) * np.linspace(0.1, 1.8, width)
    mixing = np.linalg.qr(rng.normal(size=(student_width, student_width)))[0]
    rotation = np.linalg.qr(rng.normal(size=(teacher_width, teacher_width)))[0]
    student = (latent + noise)[:, :student_width] @ mixing + offset * rng.normal(size=student_width)
    teacher = latent[:, :teacher_width] * 0.8 ** np.arange(teacher_width) @ rotation
    return student, teacher + offset * rng.normal(size=teacher_width)


def signed(rows):
    """Each row with its largest entry positive."""
    return np.array([row if row[np.abs(row).argmax()] > 0 else -row for row in rows])


def principal_directions(teacher):
    """Eq. 12 at full rank: eigenvectors of the sample covariance as rows, by falling eigenvalue."""
    _, vectors = np.linalg.eigh(np.atleast_2d(np.cov(teacher, rowvar=False)))
    return signed(vectors.T[::-1])


def least_squares(student, wanted, affine):
    """Eq. 13: P_S [R, S] and b [R] that minimise Σ ‖P_S h + b − wanted‖²; b = 0 unless affine."""
    inputs = np.column_stack([student, np.ones(len(student))]) if affine else student
    solution = np.linalg.lstsq(inputs, wanted, rcond=None)[0].T
    width = student.shape[1]
    return solution[:, :width], solution[:, width] if affine else np.zeros(len(solution))


def mean_squared_error(student, teacher, projector):
    """Mean over rows of ‖P_S h_S + b − P_T(h_T − μ_T)‖², from a projector's tensors."""
    p, b, q, mean = (getattr(projector, name).numpy() for name in ("student", "offset", "teacher", "mean"))
    return (((student @ p.T + b) - (teacher - mean) @ q.T) ** 2).sum(1).mean()


def cosines(predicted, wanted):
    """Mean over rows of the cosine in the first 1, 2, … coordinates."""
    curve = []
    for rank in range(1, wanted.shape[1] + 1):
        a, b = predicted[:, :rank], wanted[:, :rank]
        curve.append(((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).mean())
    return np.array(curve)


def eq30(variance, share):
    """Eq. 30 at ranks 0, 1, …: what is left out though predictable, and kept though not."""
    share = np.clip(share, 0, 1)
    ranks = range(len(variance) + 1)
    return np.array([(variance * share)[r:].sum() + (variance * (1 - share))[:r].sum() for r in ranks])


def cka(student, teacher):
    """Linear CKA by its definition on kernels: HSIC(K, L) / √(HSIC(K, K) HSIC(L, L))."""
    student, teacher = student - student.mean(0), teacher - teacher.mean(0)
    k, l = student @ student.T, teacher @ teacher.T  # noqa: E741
    return (k * l).sum() / np.sqrt((k * k).sum() * (l * l).sum())


def report(student, teacher, held_out, affine, kept=slice(None)):
    """Held-out measures of the directions `kept`: P_T and μ_T of all rows, P_S of the others."""
    directions, mean = principal_directions(teacher)[kept], teacher.mean(0)
    wanted = (teacher - mean) @ directions.T
    matrix, offset = least_squares(student[~held_out], wanted[~held_out], affine)
    predicted, wanted = student[held_out] @ matrix.T + offset, wanted[held_out]
    error, variance = ((predicted - wanted) ** 2).mean(0), (wanted**2).mean(0)
    share = 1 - error / variance
    eigenvalues = np.linalg.eigvalsh(np.atleast_2d(np.cov(teacher, rowvar=False)))[::-1]
    return {
        "variance": variance,
        "share": share,
        "error": eq30(variance, share),
        "mse": error.cumsum() / np.arange(1, len(error) + 1),
        "cosine": cosines(predicted, wanted),
        "explained": eigenvalues.cumsum() / eigenvalues.sum(),
    }


def reduced_rank(student, teacher):
    """Directions [T, T] of reduced-rank regression, and the least total squared error at ranks 1, 2, …

    By Eckart and Young: the best rank-r prediction is the ordinary one, cut to its first r singular vectors.
    """
    student, teacher = student - student.mean(0), teacher - teacher.mean(0)
    predicted = student @ np.linalg.lstsq(student, teacher, rcond=None)[0]
    _, values, directions = np.linalg.svd(predicted, full_matrices=False)
    residual = ((teacher - predicted) ** 2).sum()
    return signed(directions), [residual + (values[r:] ** 2).sum() for r in range(1, len(values) + 1)]


def best_monotone_sum(scores):
    """The largest sum over all non-decreasing choices of one column per row, by trying every one."""
    choices = itertools.combinations_with_replacement(range(len(scores[0])), len(scores))
    return max(sum(row[j] for row, j in zip(scores, choice, strict=True)) for choice in choices)
