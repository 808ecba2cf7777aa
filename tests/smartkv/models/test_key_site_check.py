"""The check that a model's pre-RoPE keys are read at the right place."""

from dataclasses import replace

import pytest

from smartkv.errors import SmartKVError
from smartkv.models.backbone import freeze
from smartkv.models.key_site_check import check_key_site
from smartkv.models.key_sites import KEY_SITES
from tests.models import FAMILIES, llama, qwen3, tiny_tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_the_key_site_of_every_family_passes_its_check(family: str) -> None:
    site = check_key_site(freeze(FAMILIES[family](), tiny_tokenizer(), family))
    assert site["difference_after_rotation"] < 1e-5
    assert site["rotary"] == (family != "gpt2")


def test_a_wrong_key_site_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = replace(KEY_SITES["llama"], module="v_proj")
    monkeypatch.setitem(KEY_SITES, "llama", wrong)
    with pytest.raises(SmartKVError, match=r"v_proj .* is not the pre-RoPE key"):
        check_key_site(freeze(llama(), tiny_tokenizer(), "tiny"))


def test_keys_of_another_shape_are_refused_with_both_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    site = KEY_SITES["llama"]
    halves = replace(site, read=lambda output, attention: site.read(output, attention)[..., :4])
    monkeypatch.setitem(KEY_SITES, "llama", halves)
    with pytest.raises(SmartKVError, match=r"layer 0: the key has shape \[2, 16, 4\], expected \[2, 16, 8\]"):
        check_key_site(freeze(llama(), tiny_tokenizer(), "tiny"))


def test_the_check_reports_what_it_read() -> None:
    assert check_key_site(freeze(qwen3(), tiny_tokenizer(), "tiny"), tokens=5) | {"difference_after_rotation": 0} == {
        "module": "k_norm",
        "rotary": True,
        "shape": [2, 5, 12],
        "difference_after_rotation": 0,
    }
