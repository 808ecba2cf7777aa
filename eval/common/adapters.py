"""Puts a peft adapter, such as eviction tuning makes, into a backbone."""

import warnings
from pathlib import Path

from peft import PeftModel
from safetensors import SafetensorError

from smartkv.errors import SmartKVError
from smartkv.io.hub import hub_trouble, is_local, was_downloaded
from smartkv.models.backbone import Backbone


def with_adapter(lm: Backbone, adapter: str | None) -> Backbone:
    """Put an adapter into a backbone, in place.

    The adapter is not merged into the weights, because bfloat16 would round its small changes away.

    Args:
        lm: the backbone.
        adapter: folder or hub id of a peft adapter; None: the backbone stays as it is.

    Returns:
        `lm` itself.

    Raises:
        SmartKVError: the adapter cannot be read, or it belongs to another model.
    """
    if adapter is None:
        return lm
    if not Path(adapter).is_dir():
        trouble = f"there is no folder '{adapter}'" if is_local(adapter) else hub_trouble()
        if trouble and not was_downloaded(adapter, "adapter_config.json"):
            raise SmartKVError(f"the adapter '{adapter}' cannot be had: {trouble}")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing adapter keys.*")  # it has fewer layers than the model
            PeftModel.from_pretrained(lm.model, adapter).requires_grad_(False).eval()
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, UserWarning, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        where = "folder" if Path(adapter).exists() else "name"
        raise SmartKVError(f"the adapter in {where} '{adapter}' does not go with '{lm.name}': {reason}") from error
    return lm
