"""The three resizers, against diffusers' own, on the pixels before they are encoded."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers.pipelines.cosmos.pipeline_cosmos3_omni import Cosmos3OmniPipeline, _preprocess_conditioning_image
from diffusers.video_processor import VideoProcessor
from PIL import Image

from cosmos3_core.conditioning.resize import crop_to_fill, fit_and_pad, stretch
from cosmos3_core.errors import RequestError

PROCESSOR = VideoProcessor(vae_scale_factor=16, resample="bilinear")
TARGETS = ((64, 112), (96, 96), (112, 64))

# Height by width: 16:9, 3:2, 1:1, 4:5, 9:16 and two extreme ones, of about 10,000 pixels, odd where it can be.
ASPECTS = ((75, 133), (81, 121), (99, 101), (112, 89), (131, 77), (40, 251), (233, 43))
SCALES = (0.42, 1.0, 2.3)  # well below the target, around it, above
SIZES = [
    (max(17, round(rows * scale)), max(17, round(columns * scale))) for rows, columns in ASPECTS for scale in SCALES
]


def noise(*shape):
    """Smooth and rough parts, the extremes 0 and 255 included."""
    pixels = np.random.default_rng(shape[-3]).integers(0, 256, shape).astype(np.uint8)
    pixels[..., : shape[-2] // 2, :] = np.linspace(0, 255, shape[-3])[:, None, None].astype(np.uint8)
    return pixels


def images(frames):
    return [Image.fromarray(frame) for frame in frames]


def action_reference(frames, tier, num_frames):
    pipeline = SimpleNamespace(video_processor=PROCESSOR)
    pixels, sizes, _, _ = Cosmos3OmniPipeline._prepare_action_video_conditioning(
        pipeline, images(frames), tier, num_frames, "cpu", torch.float32
    )
    return pixels[0], tuple(int(side) for side in sizes[2:])


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_crop_to_fill(height, width):
    image = noise(height, width, 3)
    for target in TARGETS:
        expected = _preprocess_conditioning_image(Image.fromarray(image), *target)[0]
        assert torch.equal(crop_to_fill(image, *target), expected)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_stretch(height, width):
    frames = noise(2, height, width, 3)
    for target in TARGETS:
        expected = PROCESSOR.preprocess_video(images(frames), *target)[0]
        assert torch.equal(stretch(frames, *target), expected)


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("scale", [1, 3])
def test_fit_and_pad(height, width, scale):
    frames = noise(2, height * scale, width * scale, 3)
    pixels, content = fit_and_pad(frames, 256, 3)
    expected, expected_content = action_reference(frames, 256, 3)
    assert content == expected_content
    assert torch.equal(pixels, expected)


@pytest.mark.parametrize(("tier", "canvas"), [(480, (480, 832)), (704, (704, 1280)), (720, (720, 1280))])
def test_fit_and_pad_of_the_larger_tiers(tier, canvas):
    frames = noise(1, 903, 1601, 3)
    pixels, content = fit_and_pad(frames, tier, 1)
    expected, expected_content = action_reference(frames, tier, 1)
    assert pixels.shape == (3, 1, *canvas)
    assert content == expected_content
    assert torch.equal(pixels, expected)


@pytest.mark.parametrize("given", [1, 3, 5, 9])
def test_time_is_cut_or_the_last_frame_repeated(given):
    frames = noise(given, 50, 90, 3)
    pixels, _ = fit_and_pad(frames, 256, 5)
    assert pixels.shape[1] == 5
    assert torch.equal(pixels, action_reference(frames, 256, 5)[0])


def test_both_ways_to_pad_occur():
    """Mirrored where the picture is large enough for it, else its edge repeated."""
    large, (rows, _) = fit_and_pad(noise(1, 160, 320, 3), 256, 1)
    assert torch.equal(large[:, :, rows], large[:, :, rows - 2])
    small, (rows, _) = fit_and_pad(noise(1, 48, 80, 3), 256, 1)
    assert torch.equal(small[:, :, rows], small[:, :, rows - 1])
    assert torch.equal(small[:, :, -1], small[:, :, rows - 1])


def test_results_are_fp32_and_inputs_are_left_alone():
    frames = noise(2, 61, 97, 3)
    frames.flags.writeable = False  # as arrays are that came from another process
    kept = frames.copy()
    for pixels in (crop_to_fill(frames[0], 32, 48), stretch(frames, 32, 48), fit_and_pad(frames, 256, 4)[0]):
        assert pixels.dtype == torch.float32
        assert pixels.is_contiguous()
    assert (frames == kept).all()


def test_a_view_that_is_not_contiguous_is_taken():
    frames = noise(2, 61, 97, 3)
    turned = frames.swapaxes(1, 2)[:, ::-1]
    assert torch.equal(stretch(turned, 48, 32), stretch(turned.copy(), 48, 32))
    assert torch.equal(crop_to_fill(turned[0], 48, 32), crop_to_fill(turned[0].copy(), 48, 32))


def test_too_small_a_clip_is_refused():
    with pytest.raises(RequestError, match="at least 16 pixels"):
        fit_and_pad(noise(1, 15, 40, 3), 256, 1)
