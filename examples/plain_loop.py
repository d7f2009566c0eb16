"""OPRD in a plain PyTorch loop: no trainer, only LayerMap, Positions, capture and a loss.

python examples/plain_loop.py
"""

import random

import torch

from oprd import LayerMap, Positions, capture, load_model, load_tokenizer, losses


def distil(steps: int = 20, batch_size: int = 16) -> list[float]:
    """Distil the bundled student for a few steps; returns the loss of each."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer("tiny:student")
    student = load_model("tiny:student", dtype="float32")
    teacher = load_model("tiny:teacher", dtype="float32").eval()
    layers = LayerMap.parse("all", num_student=4, num_teacher=4)
    positions = Positions.parse("all")
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    numbers, history = random.Random(0), []
    for step in range(steps):
        sums = [[numbers.randint(1, 99) for _ in range(4)] for _ in range(batch_size)]
        chats = [[{"role": "user", "content": f"Compute {'+'.join(map(str, terms))}."}] for terms in sums]
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
