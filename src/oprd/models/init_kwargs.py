"""How a run's models are loaded, from its keys."""

from typing import Any

from oprd.foundation.errors import UserError

OF_LOADING = {
    "teacher_model_init_kwargs": None,
    "teacher_model_revision": None,
    "teacher_quantization": "none",
}


def student_kwargs(settings: Any) -> dict[str, Any]:
    """Arguments of the student's `from_pretrained`, from an `OPRDConfig`."""
    return {"trust_remote_code": settings.trust_remote_code} | dict(settings.model_init_kwargs or {})


def teacher_kwargs(settings: Any) -> dict[str, Any]:
    """Arguments of the teacher's, except how it is quantised; `dtype` only if the user names one."""
    given = dict(settings.teacher_model_init_kwargs or {})
    if settings.teacher_model_revision is not None:
        given.setdefault("revision", settings.teacher_model_revision)
    given.setdefault("trust_remote_code", settings.trust_remote_code)
    return given


def reference_kwargs(settings: Any) -> dict[str, Any]:
    """Arguments of the reference's: the teacher's, but for the revision, which is of another repository."""
    return {name: value for name, value in teacher_kwargs(settings).items() if name != "revision"}


def check_loaded_teacher(settings: Any) -> None:
    """Raise `UserError` for keys that say how to load a teacher, where it is given as a model object."""
    for key, default in OF_LOADING.items():
        if getattr(settings, key) not in (default, {}):
            raise UserError(
                f"{key} says how the teacher is loaded, and teacher_model is a model that was loaded "
                f"already: leave {key} out, or give the teacher as a name"
            )


def hub_kwargs(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments that a config and a tokenizer take too."""
    return {key: given[key] for key in ("revision", "trust_remote_code") if key in given}
