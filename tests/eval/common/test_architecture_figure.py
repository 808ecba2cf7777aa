"""The diagram of the architecture."""

from matplotlib.patches import FancyBboxPatch

from eval.common.architecture_figure import TRAIN, USE, architecture_figure
from tests.imports import ROOT


def test_every_place_that_a_box_names_is_a_folder_of_the_project() -> None:
    places = [place for _, _, place in (*TRAIN, *USE) if place != "transformers"]
    assert places and all((ROOT / place).is_dir() for place in places)


def test_every_text_of_a_box_fits_into_it() -> None:
    figure = architecture_figure()
    axes = figure.axes[0]
    boxes = [patch.get_window_extent() for patch in axes.patches if isinstance(patch, FancyBboxPatch)]
    words = {word for box in (*TRAIN, *USE) for word in box}
    inside = [text.get_window_extent() for text in axes.texts if text.get_text() in words]
    assert len(boxes) == 8 and len(inside) == 24
    for text in inside:
        assert any(box.x0 < text.x0 and text.x1 < box.x1 and box.y0 < text.y0 and text.y1 < box.y1 for box in boxes)
