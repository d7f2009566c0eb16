"""The file of a bridge that nobody fitted."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from oprd.bridge import Bridge
from oprd.bridge.artifact import Projector
from oprd.bridge.identity import identity

PAIRS = ((1, 1), (2, 3), (3, 5))
RANK, LEVEL = 4, 0.9
READING = {"final_norm": True, "teacher_chat_template": "student", "teacher_tokenization": "own"}


def save_random_bridge(folder, student, teacher, pairs=PAIRS, rank=RANK, **metadata):
    """The file of a made-up bridge that names the models of two folders as those it was fitted on."""
    generator = torch.Generator().manual_seed(5)
    models = [AutoModelForCausalLM.from_pretrained(name) for name in (student, teacher)]
    s, t = (model.config.hidden_size for model in models)
    shapes = (rank, s), (rank,), (rank, t), (t,)
    projectors = {
        layer: Projector(other, *(torch.randn(shape, generator=generator) for shape in shapes))
        for layer, other in pairs
    }
    tokenizers = [AutoTokenizer.from_pretrained(name) for name in (student, teacher)]
    origin = {
        "student": identity(models[0], tokenizers[0]),
        "teacher": identity(models[1], tokenizers[1]),
        "reading": READING,
        "layers": {str(layer): {"cosine_at_rank": LEVEL} for layer, _ in pairs},
    }
    return str(Bridge(projectors, origin | metadata).save(folder))
