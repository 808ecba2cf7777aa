"""A backbone with an adapter that eviction tuning left."""

import warnings
from pathlib import Path

from peft import PeftModel
from safetensors import SafetensorError

from smartkv.errors import SmartKVError
from smartkv.models.backbone import Backbone


def with_adapter(lm: Backbone, adapter: str | None) -> Backbone:
    """`lm` with the adapter in it, in place; it is not merged: in bfloat16 its small changes would be rounded away.

    Args:
        adapter: folder, or hub id, of a peft adapter; None: nothing is changed.

    Raises:
        SmartKVError: there is none, or it is of another model.
    """
    if adapter is None:
        return lm
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing adapter keys.*")  # it has fewer layers than the model
            PeftModel.from_pretrained(lm.model, adapter).requires_grad_(False).eval()
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, UserWarning, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        where = "folder" if Path(adapter).exists() else "name"
        raise SmartKVError(f"the adapter in {where} '{adapter}' does not go with '{lm.name}': {reason}") from error
    return lm
