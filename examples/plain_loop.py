"""OPRD in a plain PyTorch loop: no trainer, only LayerMap, Positions, capture and a loss.

python examples/plain_loop.py
"""

import torch

from oprd import LayerMap, Positions, capture, losses
from oprd.models.loading import load_model, load_tokenizer, resolve_model
from oprd.models.tiny import task


def distil(steps: int = 20, batch_size: int = 16) -> list[float]:
    """Distil the bundled student for a few steps; returns the loss of each."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(resolve_model("tiny:student"))
    student = load_model(resolve_model("tiny:student"), dtype="float32")
    teacher = load_model(resolve_model("tiny:teacher"), dtype="float32").eval()
    layers = LayerMap.parse("all", num_student=4, num_teacher=4)
    positions = Positions.parse("all")
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    history = []
    for step in range(steps):
        chats = [
            task.question(p) for _, p in zip(range(batch_size), task.problems("train", step), strict=False)
        ]
        prompts = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True
        )
        width = prompts["input_ids"].shape[1]
        ids = student.generate(**prompts, max_new_tokens=64, do_sample=True, temperature=1.0, top_k=0)
        response = ids[:, width:]
        ended = (response == tokenizer.eos_token_id).cumsum(-1)
        response_mask = (ended == 0) | ((ended == 1) & (response == tokenizer.eos_token_id))
        # Row t predicts response token t, so it lies one position earlier.
        rows = torch.zeros_like(ids, dtype=torch.bool)
        rows[:, width - 1 : -1] = positions.mask(response_mask)
        mask = torch.cat([prompts["attention_mask"], response_mask.long()], dim=1)
        with torch.no_grad(), capture(teacher, layers.teacher_layers, rows, stop_early=True) as wanted:
            teacher(input_ids=ids, attention_mask=mask)
        with capture(student, layers.student_layers, rows, stop_early=True) as states:
            student(input_ids=ids, attention_mask=mask)
        per_layer = [losses.relative_mse(states[s], wanted[t]).mean() for s, t in layers.pairs]
        loss = torch.stack(per_layer).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
        print(f"step {step + 1:3d}  loss {loss.item():.4f}")
    return history


if __name__ == "__main__":
    distil()
