"""What a run needs besides its models, checked before they are loaded: packages, trackers, the Hub."""

from typing import Any

from huggingface_hub import HfApi
from transformers.integrations import get_reporting_integration_callbacks
from transformers.utils import is_liger_kernel_available

from oprd.foundation.errors import UserError, reason, whatever_fails_is


def check_installed(settings: Any) -> None:
    """Raise `UserError` for what the `TrainingArguments` of a run need and this machine lacks."""
    for name in settings.report_to:
        try:
            for callback in get_reporting_integration_callbacks(name):
                callback()
        except (ImportError, RuntimeError, ValueError) as error:
            raise UserError(f"report_to: {name}: {reason(error)}; or set report_to: none") from error
    if settings.use_liger_kernel and not is_liger_kernel_available():
        raise UserError("use_liger_kernel: true needs Liger: pip install liger-kernel, or leave it out")
    if settings.push_to_hub and settings.process_index == 0:
        with whatever_fails_is(
            lambda error: (
                f"push_to_hub: true, and the Hub cannot be reached as a user ({reason(error)}): "
                "log in with hf auth login, or set push_to_hub: false"
            )
        ):
            HfApi(token=settings.hub_token).whoami()
