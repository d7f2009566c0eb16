"""The keys of a bridge recipe."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from oprd.bridge.pair import Directions, FitSettings, Method, Rank
from oprd.foundation.errors import UserError
from oprd.foundation.ranges import EVALUATION_RANGES, check_ranges
from oprd.foundation.recipe import parse_recipe
from oprd.objective.selection import Positions
from oprd.objective.settings import TEACHER_TEMPLATES, TEACHER_TOKENIZATIONS, key, mapping, one_of
from oprd.rollouts.engines.choose import ENGINES
from oprd.rollouts.generation import Sampling

DTYPES = ("auto", "float32", "bfloat16")


@dataclass
class BridgeArguments:
    """The keys of a bridge recipe; defaults are the paper's where it names them."""

    model_name_or_path: str = key("", "Student: a Hub name, a folder or tiny:student.")
    teacher_model_name_or_path: str = key("", "Teacher: a Hub name, a folder or tiny:bridge-teacher.")
    dataset_name: str = key(
        "", "Prompts: a Hub name, a folder, a parquet, jsonl or json file, tiny or word-problems."
    )
    dataset_config: str | None = key(None, "Configuration of a Hub dataset.")
    dataset_train_split: str = key("train", "Split of the dataset.")
    output_dir: str = key("", "Folder for the bridge and its report.")
    layers: str = key("all", "As in training (Eq. 11), or best: the order-preserving map with the best fit.")
    rank: str = key("auto", "Directions per layer, or auto: minimises the held-out error (Eq. 30).")
    max_rank: int = key(256, "Upper limit for rank: auto.")
    method: Method = key("pca", "pca (Eq. 12) | rrr (reduced-rank regression).")
    affine: str = key("auto", "Add a bias to P_S: auto (if the held-out error is lower) | true | false.")
    standardize: bool = key(False, "Divide every dimension by its standard deviation before the fit.")
    directions: Directions = key(
        "leading", "leading | predictable (largest held-out gain; ρ² ≥ ½ under auto)."
    )
    holdout: float = key(0.1, "Share of rollouts held out for validation.")
    positions: str = key("all", "Response rows of the fit: all | last=k | first=k.")
    num_prompts: int = key(2000, "Prompts to sample.")
    num_generations: int = key(1, "Rollouts per prompt.")
    max_completion_length: int = key(16384, "Longest response, in tokens.")
    max_prompt_length: int | None = key(None, "Drop (never cut) prompts of more tokens than this.")
    drop_unrenderable_prompts: bool = key(
        False, "Drop and count prompts that are malformed or that a chat template refuses; default: stop."
    )
    temperature: float = key(1.0, "Sampling temperature.")
    top_p: float = key(1.0, "Top-p (nucleus) sampling.")
    top_k: int = key(0, "Most likely tokens to sample from; 0 = all.")
    batch_size: int = key(16, "Rollouts generated and read at a time.")
    final_norm: bool = key(True, "Take the last layer after the final norm, as hidden_states[L].")
    teacher_chat_template: str = key("student", "student | own; with another tokenizer always own.")
    teacher_tokenization: str = key("own", "own | student (the authors' way, a baseline).")
    chat_template_kwargs: dict | str | None = key(None, "Arguments of the student's chat template.")
    teacher_chat_template_kwargs: dict | str | None = key(None, "Arguments of the teacher's.")
    all_pairs_gib: float = key(4.0, "Memory for comparing all layers of both models (CKA, layers: best).")
    engine: str = key("auto", "Rollout engine: auto (vLLM if it is installed) | hf | vllm.")
    vllm_server_base_url: str | None = key(None, "Generate rollouts on this vllm serve server.")
    vllm_gpu_memory_utilization: float = key(0.3, "Share of the GPU's memory that vLLM may take.")
    trust_remote_code: bool = key(False, "Run the code that comes with the models.")
    dtype: str = key("auto", "Dtype of both models: auto (as saved) | float32 | bfloat16.")
    seed: int = key(42, "Seed of prompts and sampling.")

    def __post_init__(self) -> None:
        for name in ("model_name_or_path", "teacher_model_name_or_path", "dataset_name", "output_dir"):
            if not getattr(self, name):
                raise UserError(f"the bridge recipe names no {name}: add it to the recipe or as a flag")
        check_ranges(vars(self), EVALUATION_RANGES)
        self.template_kwargs = mapping("chat_template_kwargs", self.chat_template_kwargs)
        self.teacher_template_kwargs = mapping(
            "teacher_chat_template_kwargs", self.teacher_chat_template_kwargs
        )
        one_of("teacher_chat_template", self.teacher_chat_template, TEACHER_TEMPLATES)
        one_of("teacher_tokenization", self.teacher_tokenization, TEACHER_TOKENIZATIONS)
        one_of("dtype", self.dtype, DTYPES)
        one_of("engine", self.engine, ENGINES)
        self.affine = str(self.affine).lower()
        forms = {"auto": None, "true": True, "false": False}
        one_of("affine", self.affine, forms)
        if not (self.rank == "auto" or (self.rank.isdecimal() and int(self.rank) > 0)):
            raise UserError(f"rank: {self.rank!r} is neither auto nor a whole number from 1 on")
        chooses = self.rank == "auto" or self.layers == "best" or self.directions == "predictable"
        if self.holdout == 0 and chooses:
            raise UserError(
                f"holdout: {self.holdout} leaves no rollouts to choose by: raise it, "
                "or set rank, layers and directions"
            )
        self.sampling = Sampling(self.max_completion_length, self.temperature, self.top_p, self.top_k)
        self.fit_settings = FitSettings(
            self.max_rank, self.method, forms[self.affine], self.standardize, self.directions
        )
        Positions.parse(self.positions)

    @property
    def chosen_rank(self) -> Rank:
        """`rank` as the fitter takes it."""
        return "auto" if self.rank == "auto" else int(self.rank)


def parse_bridge_recipe(path: str | Path | None, flags: Sequence[str] = ()) -> BridgeArguments:
    """Read and validate a bridge recipe; raises `UserError`."""
    try:
        (arguments,) = parse_recipe(path, flags, (BridgeArguments,))
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UserError(f"{path or 'the command line'}: {error}") from error
    return arguments
