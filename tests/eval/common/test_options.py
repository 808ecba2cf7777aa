"""Groups of options."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from eval.common.options import AdaptedModel, CalibrationTexts, Model, NamedTexts
from smartkv.errors import SmartKVError
from smartkv.models.backbone import load_backbone


def test_a_model_is_loaded_as_it_says(tiny_backbone: Path) -> None:
    model = Model(str(tiny_backbone), "bfloat16")
    lm = model.load()
    assert lm.model.dtype == torch.bfloat16 and model.architecture() == lm.architecture
    with pytest.raises(SmartKVError, match="cannot be used here"):
        Model(str(tiny_backbone), device="no-such-device").load()


def test_an_adapted_model_computes_with_its_adapter(tiny_backbone: Path, tmp_path: Path) -> None:
    trained = get_peft_model(load_backbone(str(tiny_backbone), "float32").model, LoraConfig(r=2))
    for name, weight in trained.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(weight)
    trained.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(10)[None]
    with torch.inference_mode():
        plain = AdaptedModel(str(tiny_backbone), "float32").load().model(ids).logits
        adapted = (
            AdaptedModel(str(tiny_backbone), "float32", adapter=str(tmp_path / "adapter")).load().model(ids).logits
        )
        torch.testing.assert_close(adapted, trained(ids).logits)
    assert not torch.allclose(adapted, plain)


def test_defaults_are_not_shared_between_objects() -> None:
    first = CalibrationTexts()
    first.sources.clear()
    assert [source.name for source in CalibrationTexts().sources] == ["pg19"]
    assert [source.name for source in NamedTexts(name="books").sources] == ["pg19"]
