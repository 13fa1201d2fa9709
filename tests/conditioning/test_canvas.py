"""The canvas table and its choice, against diffusers'."""

import pytest
from diffusers.pipelines.cosmos.pipeline_cosmos3_omni import _ACTION_RESOLUTION_BINS
from diffusers.video_processor import VideoProcessor

from cosmos3_core.conditioning.canvas import ACTION_TIERS, Canvas, action_canvas, content_size, floor_size
from cosmos3_core.errors import RequestError


def theirs(height, width, tier):
    """What diffusers does to a clip's size before it pads."""
    rows, columns = height - height % 16, width - width % 16
    canvas = VideoProcessor.classify_height_width_bin(rows, columns, ratios=_ACTION_RESOLUTION_BINS[str(tier)])
    scale = min(canvas[1] / columns, canvas[0] / rows, 1.0)
    return canvas, (max(1, int(scale * rows + 0.5)), max(1, int(scale * columns + 0.5)))


def test_the_table_is_diffusers():
    assert {str(tier): list(canvases) for tier, canvases in ACTION_TIERS.items()} == {
        tier: list(bins.values()) for tier, bins in _ACTION_RESOLUTION_BINS.items()
    }


@pytest.mark.parametrize("tier", ACTION_TIERS)
def test_every_size_gets_the_canvas_and_the_content_that_diffusers_gives(tier):
    sides = [*range(16, 2000, 37), 256, 320, 480, 640, 720, 1080, 1280, 1920]
    wrong = [
        (height, width)
        for height in sides
        for width in sides
        if (canvas := action_canvas(height, width, tier), content_size(height, width, canvas))
        != theirs(height, width, tier)
    ]
    assert wrong == []


def test_a_tie_goes_to_the_canvas_named_first():
    # 0.9 lies exactly between none of the table's floats, so the rule is shown on sizes whose ratio rounds to a middle.
    for tier, canvases in ACTION_TIERS.items():
        ratios = [canvas.height / canvas.width for canvas in canvases]
        for height, width in [(16 * a, 16 * b) for a in range(1, 60) for b in range(1, 60)]:
            distances = [abs(ratio - height / width) for ratio in ratios]
            assert action_canvas(height, width, tier) == canvases[distances.index(min(distances))]


def test_a_clip_is_never_enlarged():
    assert content_size(100, 170, Canvas(480, 832)) == (96, 160)


@pytest.mark.parametrize(("height", "width"), [(15, 100), (100, 15), (1, 1)])
def test_too_small_a_clip_is_refused(height, width):
    for call in (
        floor_size,
        lambda *size: action_canvas(*size, 256),
        lambda *size: content_size(*size, Canvas(256, 256)),
    ):
        with pytest.raises(RequestError, match="at least 16 pixels"):
            call(height, width)


@pytest.mark.parametrize("tier", [0, 255, 1080, True, "480", None, [480]])
def test_an_unknown_tier_is_refused(tier):
    with pytest.raises(RequestError, match=r"resolution_tier must be .*\[256, 480, 704, 720\]"):
        action_canvas(100, 100, tier)
