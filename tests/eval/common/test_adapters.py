"""A trained model beside its base."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from eval.common.adapters import with_adapter
from smartkv import load_backbone
from smartkv.errors import SmartKVError
from tests.eval.eviction.test_compare import run
from tests.lightning_fixtures import write_texts
from tests.models import llama


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"), splits=["train", "test"])


def test_an_adapter_of_a_model_with_fewer_layers_is_refused(tmp_path: Path) -> None:
    get_peft_model(llama(), LoraConfig(r=2, target_modules=["k_proj"])).save_pretrained(tmp_path / "adapter")
    deeper = SimpleNamespace(model=llama(num_hidden_layers=3), name="deeper")
    with pytest.raises(SmartKVError, match="does not go with 'deeper'"):
        with_adapter(deeper, str(tmp_path / "adapter"))


def test_an_adapter_changes_the_model_and_is_measured_beside_it(
    tmp_path: Path, tiny_backbone: Path, texts: Path, random_gates: Path
) -> None:
    torch.manual_seed(0)
    model = get_peft_model(
        load_backbone(str(tiny_backbone), "float32").model, LoraConfig(r=2, target_modules=["k_proj"])
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(tmp_path / "adapter")
    changes = {"gates": random_gates, "contenders": '["all-gated", "window"]', "footprints": "[0.8]"}
    plain = run(tmp_path / "out", tiny_backbone, texts, **changes)
    tuned = run(tmp_path / "out", tiny_backbone, texts, adapter=tmp_path / "adapter", **changes)
    assert plain["full"]["recall_trials"] != tuned["full"]["recall_trials"]
    assert run(tmp_path / "out", tiny_backbone, texts, **changes)["rows"] == plain["rows"]
    with pytest.raises(SystemExit):
        run(tmp_path / "out", tiny_backbone, texts, adapter=tmp_path / "none", **changes)
