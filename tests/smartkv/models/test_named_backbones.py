"""Names that stand for a downloaded file."""

from pathlib import Path

import pytest

from smartkv.errors import SmartKVError
from smartkv.models.backbone import load_backbone
from smartkv.models.named_backbones import NAMED_BACKBONES


def test_the_name_of_a_backbone_that_is_not_there_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMARTKV_CACHE", str(tmp_path))
    for name, backbone in NAMED_BACKBONES.items():
        with pytest.raises(SmartKVError, match=rf"'{name}' is not downloaded yet .* smartkv\.models\.download {name}"):
            load_backbone(name)
        with pytest.raises(SmartKVError, match=f"did you mean '{name}'"):
            load_backbone(name[:-1])
        assert len(backbone.sha256) == 64 and backbone.file.endswith(".gguf")
