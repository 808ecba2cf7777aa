"""The page of a text: what it encodes, and what a reader sees and does in a browser."""

import base64
import json
import math
import re
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eval.chat.page import UNDECIDED, encode_expiry, encode_predictions, write_page
from eval.common.score_scale import WORTH
from smartkv.errors import SmartKVError
from smartkv.policies.hybrid import FOREVER, HybridPolicy, LayerRule
from smartkv.policies.named import read_policy
from tests.eval.chat.chromium import BINARY, MISSING, Browser, browser

LAYERS, HEADS, TOKENS, SINKS, WINDOW, PRICE = 3, 2, 60, 4, 8, 2.0
HOSTILE = ["</script><script>window.hacked = 1</script>", "<img src=x onerror='window.hacked = 2'>", "<!--", "&lt;",
           "\u2028", "\"'`\\", "]]>", "%%DATA%%", "\n", "", " 🐈", "ünï", "</style>", "\x00\x07"]  # fmt: skip
RULES = (LayerRule("0-1", "gated", WINDOW), LayerRule("2", "window", 5))
POLICY = HybridPolicy(RULES, SINKS, PRICE, name="<i>mine</i>")
TEXTS = [f" t{number}" for number in range(TOKENS - len(HOSTILE))] + HOSTILE
needs_chromium = pytest.mark.skipif(BINARY is None, reason=MISSING)


def decided() -> tuple[torch.Tensor, torch.Tensor]:
    """Predictions and expiries of layers 0 and 1 with gates, and of layer 2 with a window alone; of the last three
    tokens nothing is decided yet."""
    predictions = 5.5 * torch.rand(LAYERS, HEADS, TOKENS, generator=torch.Generator().manual_seed(0)) - 0.3
    predictions[..., 20:24] = 0.5  # every head lets them go
    position = torch.arange(TOKENS)
    expiry = torch.where(predictions > PRICE, FOREVER, position + WINDOW)
    expiry[2] = position + 5
    expiry[..., :SINKS] = FOREVER
    predictions[2] = torch.nan
    predictions[..., -3:], expiry[..., -3:] = torch.nan, UNDECIDED
    return predictions, expiry


PREDICTIONS, EXPIRY = decided()
ENDS = torch.where(EXPIRY == UNDECIDED, FOREVER, EXPIRY)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "lifespans.html"
    generated = [number > 40 for number in range(TOKENS)]
    return write_page(path, TEXTS, PREDICTIONS, EXPIRY, POLICY, "<b>tiny</b>", generated)


def embedded(page: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text("utf-8"), re.S)
    assert found
    return json.loads(found[1])


# -- the file ---------------------------------------------------------------------------------------------------------


def test_the_page_holds_every_token_as_it_is(page: Path) -> None:
    assert embedded(page)["tokens"] == TEXTS


def test_predictions_come_back_to_half_a_step(page: Path) -> None:
    data = embedded(page)
    codes = np.frombuffer(base64.b64decode(data["predictions"]), np.uint8).reshape(PREDICTIONS.shape)
    known = ~PREDICTIONS.isnan().numpy()
    assert (codes[~known] == 255).all() and (codes[known] < 255).all()
    assert np.abs(codes[known] / data["steps"] - PREDICTIONS.clamp(min=0).numpy()[known]).max() <= 0.5 / 40 + 1e-6


def test_expiries_come_back_exactly(page: Path) -> None:
    codes = np.frombuffer(base64.b64decode(embedded(page)["expiry"]), "<u2").reshape(EXPIRY.shape).astype(np.int64)
    want = np.where(EXPIRY == FOREVER, 65535, np.where(EXPIRY == UNDECIDED, 65534, EXPIRY))
    assert (codes == want).all()


def test_what_is_out_of_range_goes_to_the_end_of_the_range() -> None:
    assert encode_predictions(torch.tensor([-9.0, 99.0, math.inf, math.nan])).tolist() == [0, 254, 254, 255]
    expiry = torch.tensor([0, 65533, 65534, 10**6, FOREVER, UNDECIDED])
    assert encode_expiry(expiry).tolist() == [0, 65533, 65533, 65533, 65535, 65534]


def test_no_token_and_no_name_can_leave_its_place(page: Path) -> None:
    text = page.read_text("utf-8")
    assert text.count("<script") == 2 and text.count("</script>") == 2
    assert "<b>tiny" not in text and "&lt;b&gt;tiny" in text and "<i>mine" not in text


def test_the_page_names_no_address(page: Path) -> None:
    markup = re.sub(r'id="data">.*?</script>', "", page.read_text("utf-8"), flags=re.S)
    assert not re.search(r"https?:|@import|url\(|\ssrc=|\shref=|import\(|fetch", markup)


def test_two_thousand_tokens_of_ninety_heads_fit_into_a_megabyte_and_a_half(tmp_path: Path) -> None:
    predictions = 5 * torch.rand(30, 3, 2000)
    policy = read_policy("full", 30)
    page = write_page(tmp_path / "p.html", [" word"] * 2000, predictions, torch.full((30, 3, 2000), 99), policy, "m")
    assert page.stat().st_size < 1.5e6


@pytest.mark.parametrize("tokens", [TEXTS[1:], []], ids=["one too few", "none"])
def test_shapes_that_do_not_fit_are_refused(tokens: list[str], tmp_path: Path) -> None:
    with pytest.raises(SmartKVError, match="cannot show"):
        write_page(tmp_path / "p.html", tokens, PREDICTIONS, EXPIRY, POLICY, "m")


def test_a_page_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SmartKVError, match="1 to"):
        write_page(tmp_path / "p.html", [], PREDICTIONS[..., :0], EXPIRY[..., :0], POLICY, "m")


# -- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def with_class(tab: Browser, name: str) -> list[int]:
    return tab.js(f"[...document.querySelectorAll('#text .{name}')].map((span) => +span.dataset.token)")


def gone(layer: int, head: int, t: int) -> list[int]:
    return [j for j in range(t + 1) if ENDS[layer, head, j] <= t]


def backgrounds(tab: Browser) -> list[str]:
    spans = "[...document.querySelectorAll('#text span')]"
    return tab.js(f"{spans}.map((span) => getComputedStyle(span).backgroundColor)")


@needs_chromium
def test_every_token_is_shown_and_none_is_run(tab: Browser, page: Path) -> None:
    tab.open(page)
    spans = "[...document.querySelectorAll('#text > span')]"
    assert tab.js(f"{spans}.length") == TOKENS and tab.js("document.querySelectorAll('#text *').length") == TOKENS
    shown = tab.js(f"{spans}.map((span) => span.textContent)")
    assert [text.lstrip(" ") for text in TEXTS] == shown
    assert tab.js("document.getElementById('text').textContent") == "".join(TEXTS)
    assert tab.js("window.hacked === undefined && document.querySelectorAll('img').length === 0")
    assert tab.complaints == []


@needs_chromium
def test_the_page_reaches_no_network(tab: Browser, page: Path) -> None:
    tab.open(page)
    assert tab.requests == [page.as_uri()]
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}/"
        assert tab.js(f"fetch({address!r}).then(() => 'sent', () => 'refused')") == "refused"
        image = f"new Promise((done) => Object.assign(new Image(), {{onerror: done, onload: done, src: {address!r}}}))"
        tab.js(f"{image}.then(() => null)")
        server.settimeout(0.2)
        with pytest.raises(TimeoutError):
            server.accept()
    assert any("Content Security Policy" in complaint for complaint in tab.complaints)


@needs_chromium
def test_a_script_that_is_not_the_page_s_own_does_not_run(tab: Browser, page: Path) -> None:
    tab.open(page)
    tab.js("document.head.append(Object.assign(document.createElement('script'), {textContent: 'window.hacked = 3'}))")
    assert tab.js("window.hacked === undefined")


@needs_chromium
@pytest.mark.parametrize(("layer", "head", "t"), [(0, 0, 30), (1, 1, 50), (2, 0, 17), (0, 1, TOKENS - 1)])
def test_at_a_time_the_evicted_tokens_are_marked_and_the_unread_ones(
    layer: int, head: int, t: int, tab: Browser, page: Path
) -> None:
    tab.open(page, f"#layer={layer}&head={head}&t={t}")
    assert with_class(tab, "evicted") == gone(layer, head, t) != []
    assert with_class(tab, "unread") == list(range(t + 1, TOKENS))
    assert tab.complaints == []


@needs_chromium
def test_the_mean_marks_what_no_head_holds_and_fades_by_share(tab: Browser, page: Path) -> None:
    t = 55
    tab.open(page, f"#t={t}")
    heads = [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]
    assert with_class(tab, "evicted") == sorted(set.intersection(*(set(gone(*head, t)) for head in heads))) != []
    held = ENDS.gt(t).double().mean(dim=(0, 1))
    faded = backgrounds(tab)
    tab.open(page, f"#t={t}&fade=0")
    assert with_class(tab, "evicted") == []
    plain = backgrounds(tab)
    for j in range(t + 1):
        assert (faded[j] == plain[j]) == (held[j] == 1), f"token {j}, held by {held[j]:.0%}"


@needs_chromium
def test_a_longer_life_is_a_darker_colour_on_light_and_a_lighter_one_on_dark(tab: Browser, page: Path) -> None:
    known = PREDICTIONS[0, 0, :-3]
    order = known.argsort().tolist()
    for dark in (False, True):
        tab.screen(1400, 1000, dark)
        tab.open(page, "#layer=0&head=0&fade=0")
        colours = [sum(map(float, re.findall(r"[\d.]+", colour)[:3])) for colour in backgrounds(tab)]
        shortest, longest = colours[order[0]], colours[order[-1]]
        assert (shortest < longest) == dark
        tenth = len(order) // 10
        steps = [sum(colours[j] for j in order[place : place + tenth]) for place in range(0, len(order) - tenth, tenth)]
        assert steps == sorted(steps, reverse=not dark) and len(set(steps)) == len(steps)
    tab.screen(1400, 1000)


@needs_chromium
def test_the_figures_at_a_time_are_those_of_the_cache(tab: Browser, page: Path) -> None:
    t, (layer, head) = 40, (1, 0)
    tab.open(page, f"#layer={layer}&head={head}&t={t}")
    alive = [sum(int(ENDS[layer, head, j]) > now for j in range(now + 1)) for now in range(t + 1)]
    shown = {name: tab.js(f"document.getElementById('{name}').textContent") for name in ("share", "keys", "footprint")}
    assert shown["share"] == f"{100 * alive[t] / (t + 1):.0f} %"
    assert shown["keys"] == f"{alive[t]} of {t + 1}"
    assert shown["footprint"] == f"{100 * sum(alive) / sum(range(1, t + 2)):.0f} %"
    path = tab.js("document.getElementById('live').getAttribute('d')")
    heights = [float(y) for x, y in re.findall(r"L([\d.]+) ([\d.]+)", path)][0 : 2 * TOKENS : 2]
    assert [TOKENS - height for height in heights[: t + 1]] == alive and len(heights) == TOKENS


@needs_chromium
def test_a_token_tells_what_was_predicted_and_when_it_went(tab: Browser, page: Path) -> None:
    j = next(j for j in range(10, 40) if PREDICTIONS[0, 0, j] < PRICE - 0.1)
    tab.open(page, f"#layer=0&head=0&token={j}")
    told = tab.js("document.getElementById('tip').innerText")
    assert f"t{j}" in told and f"evicted at token {j + WINDOW}, after {WINDOW}" in told
    amount = float(re.search(r"predicted to live ([\d.]+) tokens", told)[1])  # type: ignore[index]
    assert amount == pytest.approx(max(1.0, 4 ** float(PREDICTIONS[0, 0, j])), rel=0.06)
    kept = next(j for j in range(10, 40) if PREDICTIONS[0, 0, j] > PRICE + 0.1)
    for place, words in ((kept, "kept"), (0, "a sink always stays"), (TOKENS - 1, "not decided yet")):
        tab.open(page, f"#layer=0&head=0&token={place}")
        assert words in tab.js("document.getElementById('tip').innerText")
    tab.open(page, f"#layer=2&head=0&token={j}")
    assert "no gates here" in tab.js("document.getElementById('tip').innerText")


@needs_chromium
def test_gates_that_judge_for_ages_are_shown_by_worth(tab: Browser, tmp_path: Path) -> None:
    policy = replace(POLICY, price=PRICE - 3)
    path, scale = tmp_path / "worth.html", replace(WORTH, ages=(8, 24), caption="worth at age 24")
    tab.open(write_page(path, TEXTS, PREDICTIONS - 3, EXPIRY, policy, "m", scale=scale), "#layer=0&head=0&token=20")
    told = tab.js("document.getElementById('tip').innerText")
    amount = float(re.search(r"worth ([\d.]+) nats at age 24", told)[1])  # type: ignore[index]
    assert amount == pytest.approx(math.exp(float(PREDICTIONS[0, 0, 20]) - 3), rel=0.06)
    shown = {name: tab.js(f"document.getElementById('{name}').textContent") for name in ("caption", "rule")}
    assert shown["caption"] == "worth at age 24" and "lifespan" not in told and "live" not in told
    assert "then until the first age (8, 24) at which it is worth no more than 0.37 nats" in shown["rule"]


@needs_chromium
def test_the_keyboard_goes_from_token_to_token_and_sets_the_time(tab: Browser, page: Path) -> None:
    tab.open(page, "#layer=0&head=0")
    tab.js("document.querySelector('#text span[tabindex=\"0\"]').focus()")
    for key in ("ArrowDown", "ArrowRight", "ArrowRight"):
        tab.key(key)
    assert tab.js("document.activeElement.dataset.token") == "12"
    assert "token 12" in tab.js("document.getElementById('tip').innerText")
    tab.key("Enter", 13)
    assert tab.js("location.hash") == "#layer=0&head=0&t=12"
    assert with_class(tab, "unread") == list(range(13, TOKENS)) and with_class(tab, "now") == [12]
    assert tab.complaints == []


@needs_chromium
def test_the_controls_change_what_is_shown(tab: Browser, page: Path) -> None:
    tab.open(page)
    for name, value in (("layer", "1"), ("head", "0")):
        tab.js(f"(() => {{ const s = document.getElementById('{name}'); s.value = '{value}'; "
               "s.dispatchEvent(new Event('change')) })()")  # fmt: skip
    assert with_class(tab, "evicted") == gone(1, 0, TOKENS - 1)
    tab.click("#chart", x=0.5)
    assert tab.js("location.hash") == f"#layer=1&head=0&t={TOKENS // 2}"
    tab.js("document.getElementById('time').focus()")
    tab.key("ArrowRight", 39)
    assert tab.js("location.hash") == f"#layer=1&head=0&t={TOKENS // 2 + 1}"
    tab.click("#grid i")
    assert tab.js("location.hash") == f"#layer=0&head=0&t={TOKENS // 2 + 1}"
    assert with_class(tab, "evicted") == gone(0, 0, TOKENS // 2 + 1)
    tab.js("location.hash = '#layer=2&head=1&t=20'")
    tab.wait("document.getElementById('layer').value === '2'")
    assert with_class(tab, "evicted") == gone(2, 1, 20)
    assert tab.complaints == []


@needs_chromium
def test_play_reads_the_text_to_its_end(tab: Browser, page: Path) -> None:
    tab.open(page, f"#layer=0&head=0&t={TOKENS - 8}")
    tab.click("#play")
    assert tab.js("document.getElementById('play').ariaLabel") == "Pause"
    tab.wait("document.getElementById('play').ariaLabel === 'Play'")
    assert with_class(tab, "unread") == []
    assert with_class(tab, "evicted") == gone(0, 0, TOKENS - 1)


@needs_chromium
def test_every_control_has_a_name_and_a_phone_shows_the_whole_width(tab: Browser, page: Path) -> None:
    tab.screen(420, 800)
    tab.open(page)
    assert tab.js("document.scrollingElement.scrollWidth") <= 420
    controls = "[...document.querySelectorAll('select, input, button')]"
    assert tab.js(f"{controls}.every((c) => c.ariaLabel || [...c.labels].some((l) => l.textContent.trim()))")
    assert tab.js(f"{controls}.length") == 5
    tab.screen(1400, 1000)
