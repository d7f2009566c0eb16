"""The keys of `oprd train` beside those of the trainer."""

from dataclasses import dataclass, field

from oprd.foundation.errors import UserError
from oprd.models.adapters import AdapterArguments


@dataclass
class RunArguments(AdapterArguments):
    """The models' and the dataset's names, and the student's adapters, under TRL's keys."""

    model_name_or_path: str = field(
        default="", metadata={"help": "Student: a Hub name, a folder or tiny:student."}
    )
    dataset_name: str = field(
        default="",
        metadata={
            "help": "Prompts: a Hub name, a folder, a parquet, jsonl or json file, tiny or word-problems."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split of the dataset."})
    dataset_streaming: bool = field(
        default=False, metadata={"help": "Fetch only the rows of a Hub dataset that max_steps steps use."}
    )
    accuracy_dataset_name: str | None = field(
        default=None, metadata={"help": "Problems with answers, to follow accuracy during the run."}
    )
    accuracy_dataset_split: str = field(default="test", metadata={"help": "Split of these problems."})
    accuracy_steps: int = field(
        default=50, metadata={"help": "Measure accuracy every n steps, and at the first and last."}
    )
    accuracy_problems: int = field(default=64, metadata={"help": "Evaluate the first n problems."})
    accuracy_samples: int = field(default=4, metadata={"help": "Samples per problem."})
    load_best: bool = field(
        default=False,
        metadata={"help": "Keep the model with the best accuracy in best/, and end with that one."},
    )
    stop_on_collapse: int | None = field(
        default=None,
        metadata={"help": "Stop after n measurements in a row of a student that gets worse."},
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Run two steps on the longest rollouts, report the memory and stop."}
    )

    def check(self) -> None:
        """Raise `UserError` for a best model where nothing is measured."""
        if self.load_best and not self.accuracy_dataset_name:
            raise UserError("load_best goes by accuracy: set accuracy_dataset_name, or leave load_best out")
