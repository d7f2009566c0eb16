"""Build the bundled models from a seed, each by a supervised run on worked solutions.

The student is the run of the first teacher, stopped when it first answers about half of the held-out
problems. The other teachers have runs, sizes and, in one case, a tokenizer of their own. All are
ordinary HF folders.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, set_seed

from oprd.models.tiny import task
from oprd.models.tiny.tokenizer import DIGITS, PAIRS, VOCAB_SIZE, TokenizerDesign, train_tokenizer


@dataclass(frozen=True)
class TinySettings:
    """How a teacher is trained; the defaults make the one that the student comes from."""

    teacher: str = "teacher"
    student: str | None = "student"
    tokenizer: TokenizerDesign = DIGITS
    vocab_size: int = VOCAB_SIZE
    num_layers: int = 4
    width: int = 128
    steps: int = 1800
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    student_accuracy: float = 0.45
    check_every: int = 10
    num_check_problems: int = 256
    seed: int = 0


# One run each: the first makes the student and its teacher, the others a teacher for either bridge.
RUNS = (
    TinySettings(),
    TinySettings(teacher="bridge-teacher", student=None, num_layers=6, width=160, steps=1200, seed=1),
    TinySettings(
        teacher="tokenizer-teacher",
        student=None,
        tokenizer=PAIRS,
        vocab_size=512,
        num_layers=6,
        width=160,
        steps=5000,
        seed=2,
    ),
)


def build(output_dir: Path, settings: TinySettings = TinySettings()) -> dict[str, float]:
    """Train a teacher, and save it and the student it was on the way under `output_dir`.

    Returns the greedy accuracy of each on held-out problems. Raises `RuntimeError` when the run
    ends before the student's accuracy is reached.
    """
    tokenizer = train_tokenizer(_texts(2000, seed=0), settings.vocab_size, settings.tokenizer)
    set_seed(settings.seed)
    model = Qwen3ForCausalLM(_config(tokenizer, settings))
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, settings))
    batches = _batches(tokenizer, settings)
    accuracy: dict[str, float] = {}
    progress = tqdm(range(1, settings.steps + 1), desc=settings.teacher, unit="step")
    for step in progress:
        loss = model(**next(batches)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        student = settings.student
        if student and student not in accuracy and step % settings.check_every == 0:
            share = greedy_accuracy(model, tokenizer, settings.num_check_problems)
            progress.set_postfix(loss=f"{loss.item():.3f}", accuracy=f"{share:.0%}")
            if share >= settings.student_accuracy:
                accuracy[student] = share
                save_bf16(model, tokenizer, output_dir / student)
    if settings.student is not None and settings.student not in accuracy:
        raise RuntimeError(
            f"after {settings.steps} steps the model answers {share:.0%} of the problems, below the "
            f"{settings.student_accuracy:.0%} asked of the student: train longer"
        )
    accuracy[settings.teacher] = greedy_accuracy(model, tokenizer, settings.num_check_problems)
    save_bf16(model, tokenizer, output_dir / settings.teacher)
    return accuracy


@torch.no_grad()
def greedy_accuracy(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, num_problems: int) -> float:
    """Share of the first `num_problems` held-out problems solved by greedy decoding."""
    drawn = list(itertools.islice(task.problems("eval", seed=0), num_problems))
    prompts = [
        tokenizer.apply_chat_template(task.question(p), add_generation_prompt=True, tokenize=False)
        for p in drawn
    ]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    training = model.training
    model.eval()
    generator: Any = model  # transformers' type of `generate` fits none of its own models
    output = generator.generate(**inputs, max_new_tokens=64, do_sample=False)
    model.train(training)
    responses = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    pairs = zip(responses, drawn, strict=True)
    return sum(text.strip() == task.solution(p) for text, p in pairs) / num_problems


def save_bf16(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save a bfloat16 copy of `model`, which goes on training in float32."""
    state = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    copy = Qwen3ForCausalLM(model.config).bfloat16()
    copy.load_state_dict(state)
    copy.generation_config = model.generation_config
    copy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _rate(step: int, settings: TinySettings) -> float:
    """Linear warm-up, constant, then linear decay over the last third: the student is taken at full rate."""
    warm = min(1.0, (step + 1) / settings.warmup_steps)
    decay = min(1.0, 3 * (settings.steps - step) / settings.steps)
    return warm * decay


def _config(tokenizer: PreTrainedTokenizerFast, settings: TinySettings) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=settings.width,
        intermediate_size=3 * settings.width,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=settings.width // 4,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )


def _texts(count: int, seed: int) -> Iterator[str]:
    for problem in itertools.islice(task.problems("train", seed), count):
        yield f"user\n{task.question(problem)[0]['content']}"
        yield f"assistant\n{task.solution(problem)}"


def _batches(tokenizer: PreTrainedTokenizerFast, settings: TinySettings) -> Iterator[dict[str, torch.Tensor]]:
    """Endless padded batches whose labels cover the response and its EOS alone."""
    draw = task.problems("train", settings.seed + 1)
    while True:
        sequences, responses = [], []
        for problem in itertools.islice(draw, settings.batch_size):
            prompt = tokenizer.apply_chat_template(
                task.question(problem), add_generation_prompt=True, tokenize=False
            )
            response = tokenizer(task.solution(problem) + tokenizer.eos_token)["input_ids"]
            sequences.append(tokenizer(prompt)["input_ids"] + response)
            responses.append(len(response))
        width = max(map(len, sequences))
        ids = torch.full((len(sequences), width), tokenizer.pad_token_id)
        labels = torch.full_like(ids, -100)
        for i, (sequence, length) in enumerate(zip(sequences, responses, strict=True)):
            end = len(sequence)
            ids[i, :end] = torch.tensor(sequence)
            labels[i, end - length : end] = ids[i, end - length : end]
        yield {"input_ids": ids, "labels": labels, "attention_mask": (ids != tokenizer.pad_token_id).long()}
