"""The objective written out for one rollout at a time, unpadded, from `output_hidden_states=True`.

Independent of the code under test: plain sums in Python over rows in float64, differentiable in the student.
"""

import torch
from torch import Tensor
from transformers.convert_slow_tokenizer import bytes_to_unicode


def rollouts(batch: dict) -> list[tuple[list[int], list[int], list[bool]]]:
    """Prompt ids, completion ids and which completion tokens the model wrote, without padding."""
    result = []
    for i in range(len(batch["prompt_ids"])):
        prompt = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()].tolist()
        real = batch["completion_mask"][i].bool()
        own = batch["tool_mask"][i].bool() if "tool_mask" in batch else real
        result.append((prompt, batch["completion_ids"][i][real].tolist(), own[real].tolist()))
    return result


def states_and_logits(model, prompt: list[int], completion: list[int]) -> tuple[list[Tensor], Tensor]:
    """Every layer's rows and the logits rows; row t is the state that predicts completion token t."""
    ids = torch.tensor([prompt + completion])
    output = model(input_ids=ids, output_hidden_states=True, use_cache=False)
    rows = slice(len(prompt) - 1, len(prompt) + len(completion) - 1)
    return [state[0, rows].double() for state in output.hidden_states], output.logits[0, rows].double()


def chosen(supervised: list[bool], positions: str) -> list[int]:
    rows = [t for t, own in enumerate(supervised) if own]
    kind, _, count = positions.partition("=")
    if kind == "all":
        return rows
    return rows[-int(count or 1) :] if kind == "last" else rows[: int(count)]


def representation_row(name: str, s: Tensor, t: Tensor) -> Tensor:
    if name == "mse":
        return ((s - t) ** 2).sum() / len(s)
    if name == "normalized_mse":
        return 2 - 2 * (s @ t) / (s.norm() * t.norm())
    if name == "cosine":
        return 1 - (s @ t) / (s.norm() * t.norm())
    if name == "relative_mse":
        return ((s - t) ** 2).sum() / (t**2).sum()
    distance = (s - t).abs()
    return torch.where(distance < 1, distance**2 / 2, distance - 0.5).mean()


def output_row(kind: dict, student_logits: Tensor, teacher_logits: Tensor, token: int) -> Tensor:
    """`kind`: output_loss and the settings it reads; the sampled token is given by value and Eq. 19."""
    log_p = (student_logits / kind.get("student_temperature", 1.0)).log_softmax(-1)
    log_q = (teacher_logits / kind.get("teacher_temperature", 1.0)).log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    name = kind["output_loss"]
    if name == "sampled_token":
        advantage = (log_p[token] - log_q[token]).detach()
        mean = (p * (log_p - log_q)).sum().detach() if kind.get("output_baseline") == "kl" else 0
        return advantage + (advantage - mean) * (log_p[token] - log_p[token].detach())
    if name == "full_vocab":
        m = (p + q) / 2
        return {
            "reverse_kl": (p * (log_p - log_q)).sum(),
            "forward_kl": (q * (log_q - log_p)).sum(),
            "jsd": ((p * (log_p - m.log())).sum() + (q * (log_q - m.log())).sum()) / 2,
        }[kind.get("divergence", "reverse_kl")]
    k = kind["output_top_k"]
    ours, theirs = set(log_p.topk(k).indices.tolist()), set(log_q.topk(k).indices.tolist())
    support = {"student": ours, "teacher": theirs, "union": ours | theirs, "intersection": ours & theirs}
    tokens = sorted(support[kind.get("output_support", "student")])
    if not tokens:
        return 0 * log_p.sum()
    p, q, log_ratio = p[tokens], q[tokens], (log_p - log_q)[tokens]
    if name == "top_k_authors":
        weighed = (p / p.sum() * log_ratio).detach()
        return weighed.sum() + (weighed * (log_p[tokens] - log_p[tokens].detach())).sum()
    if not kind.get("renormalize", True):
        return (p * log_ratio).sum()
    p, q = p / p.sum(), q / q.sum()
    return (p * (p / q).log()).sum()


def reduce(per_rollout: list[list[Tensor]], reduction: str) -> Tensor:
    """Eq. 6: the mean over rollouts with a row of the mean over their rows; or the mean over all rows."""
    filled = [torch.stack(rows) for rows in per_rollout if rows]
    if reduction == "token":
        return torch.cat(filled).mean()
    return torch.stack([rows.mean() for rows in filled]).mean()


def representation_loss(
    student, teacher, given, pairs, loss="mse", positions="all", reduction="rollout", teacher_prompts=None
) -> Tensor:
    """Eq. 6; `given` as from `rollouts`; `teacher_prompts` where the teacher reads other prompts."""
    per_layer = []
    for i_s, i_t in pairs:
        values = []
        for i, (prompt, completion, supervised) in enumerate(given):
            s = states_and_logits(student, prompt, completion)[0][i_s]
            with torch.no_grad():
                other = teacher_prompts[i] if teacher_prompts else prompt
                t = states_and_logits(teacher, other, completion)[0][i_t]
            values.append([representation_row(loss, s[row], t[row]) for row in chosen(supervised, positions)])
        per_layer.append(reduce(values, reduction))
    return torch.stack(per_layer).mean()


def bridge_loss(
    student,
    teacher,
    given,
    pairs,
    tensors,
    loss="normalized_mse",
    positions="all",
    reduction="rollout",
    read=(),
) -> Tensor:
    """Eq. 14–15; `tensors` as stored in the bridge's file, by name and student layer.

    `read` where the teacher reads other tokens: for every rollout its prompt, its completion and
    `{student row: teacher row}` of the rows that are compared.
    """
    per_layer = []
    for i_s, i_t in pairs:
        p_s, b, p_t, mean = (tensors[f"{n}.{i_s}"].double() for n in ("student", "offset", "teacher", "mean"))
        values = []
        for i, (prompt, completion, supervised) in enumerate(given):
            same = {row: row for row in range(len(completion))}
            other_prompt, other_completion, partner = read[i] if read else (prompt, completion, same)
            s = states_and_logits(student, prompt, completion)[0][i_s] @ p_s.T + b
            with torch.no_grad():
                t = (states_and_logits(teacher, other_prompt, other_completion)[0][i_t] - mean) @ p_t.T
            paired = [own and row in partner for row, own in enumerate(supervised)]
            rows = chosen(paired, positions)
            values.append([representation_row(loss, s[row], t[partner[row]]) for row in rows])
        per_layer.append(reduce(values, reduction))
    return torch.stack(per_layer).mean()


BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}


def spelled(tokenizer, ids: list[int]) -> list[bytes]:
    """What every prefix of `ids`, but for an EOS at its end, spells under a byte-level tokenizer."""
    prefix, result = b"", []
    for token in tokenizer.convert_ids_to_tokens(ids):
        if token != tokenizer.eos_token:
            prefix += bytes(BYTE_OF[character] for character in token)
            result.append(prefix)
    return result


def translated(tokenizer, teacher_tokenizer, completion: list[int]) -> tuple[list[int], dict[int, int]]:
    """The teacher's tokens of what valid text a completion holds, and its row for each paired student row."""
    ours = spelled(tokenizer, completion)
    text, whole = ours[-1] if ours else b"", True
    try:
        text.decode()
    except UnicodeDecodeError as error:
        text, whole = text[: error.start], False
    ids = teacher_tokenizer(text.decode(), add_special_tokens=False)["input_ids"]
    theirs = spelled(teacher_tokenizer, ids)
    if whole and completion[-1] == tokenizer.eos_token_id:
        ids = [*ids, teacher_tokenizer.eos_token_id]
    read = [(0, 0)] + [(ours.index(prefix) + 1, j + 1) for j, prefix in enumerate(theirs) if prefix in ours]
    return ids, {i: j for i, j in read if i < len(completion) and j < len(ids)}


def text_spans(completion, ids, rows, ends) -> list[tuple[range, range]]:
    """The rows of both models that write the text from one pair of rows to the next; the last if both end."""
    if not rows:
        return []
    starts = sorted(rows.items())
    stops = [*starts[1:], (len(completion), len(ids))]
    spans = [(range(i, k), range(j, m)) for (i, j), (k, m) in zip(starts, stops, strict=True)]
    return spans if (completion[-1], ids[-1]) == ends else spans[:-1]


def text_loss(student, teacher, given, read, ends, positions="all", reduction="rollout", temperatures=(1, 1)):
    """The sampled token's loss over spans of text; the span's advantage goes to the row after it as well."""
    values = []
    for (prompt, completion, supervised), (other, ids, rows) in zip(given, read, strict=True):
        log_p = (states_and_logits(student, prompt, completion)[1] / temperatures[0]).log_softmax(-1)
        with torch.no_grad():
            log_q = (states_and_logits(teacher, other, ids)[1] / temperatures[1]).log_softmax(-1)
        wanted, carried, values_here = chosen(supervised, positions), (None, 0.0), []
        for ours, theirs in text_spans(completion, ids, rows, ends):
            if not set(ours) <= set(wanted):
                continue
            q = sum(log_q[j, ids[j]] for j in theirs)
            advantage = sum(log_p[i, completion[i]].detach() for i in ours) - q
            for i in ours:
                log_p_i = log_p[i, completion[i]]
                credit = advantage + (carried[1] if carried[0] == i else 0.0)
                values_here.append(log_p_i.detach() - q / len(ours) + credit * (log_p_i - log_p_i.detach()))
            carried = ours.stop, advantage
        values.append(values_here)
    return reduce(values, reduction)


def output_loss(
    student, teacher, given, kind: dict, positions="all", reduction="rollout", teacher_prompts=None
) -> Tensor:
    values = []
    for i, (prompt, completion, supervised) in enumerate(given):
        s = states_and_logits(student, prompt, completion)[1]
        with torch.no_grad():
            other = teacher_prompts[i] if teacher_prompts else prompt
            t = states_and_logits(teacher, other, completion)[1]
        values.append(
            [output_row(kind, s[row], t[row], completion[row]) for row in chosen(supervised, positions)]
        )
    return reduce(values, reduction)
