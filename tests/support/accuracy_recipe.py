"""The recipe of a short run that measures accuracy."""

from tiny_pair import QUICK

PROBLEMS, SAMPLES = 5, 3
RECIPE = QUICK | {
    "model_name_or_path": "tiny:student",
    "teacher_model_name_or_path": "tiny:teacher",
    "dataset_name": "tiny",
    "accuracy_dataset_name": "tiny",
    "accuracy_steps": 1,
    "accuracy_problems": PROBLEMS,
    "accuracy_samples": SAMPLES,
    "max_completion_length": 48,
    "learning_rate": 0.0,  # rollouts differ with the ranks, and so would the students
    "max_steps": 1,
}
