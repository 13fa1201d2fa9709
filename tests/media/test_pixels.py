"""Float pixels -> bytes, and the hash of frames."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers.video_processor import VideoProcessor

from cosmos3_core.errors import RequestError
from cosmos3_core.media.pixels import FrameHash, to_uint8


def test_every_byte_value_survives_the_round_trip():
    values = torch.arange(256, dtype=torch.float32)
    pixels_BCFYX = (values / 255 * 2 - 1).reshape(1, 1, 1, 16, 16).expand(1, 3, 2, 16, 16)
    frames = to_uint8(pixels_BCFYX)
    assert frames.shape == (2, 16, 16, 3)
    assert frames.dtype == torch.uint8
    assert frames.is_contiguous()
    assert frames[1, ..., 2].flatten().tolist() == list(range(256))


def test_axes_land_where_they_belong():
    pixels_BCFYX = torch.full((1, 3, 2, 4, 6), -1.0)
    pixels_BCFYX[0, 1, 1, 2, 5] = 1.0
    frames = to_uint8(pixels_BCFYX)
    assert frames.nonzero().tolist() == [[1, 2, 5, 1]]
    assert frames.max() == 255


def test_halves_go_to_even_and_the_rest_is_clamped():
    halves = torch.tensor([126.5, 127.5, 128.5]) / 255
    assert (halves * 255).tolist() == [126.5, 127.5, 128.5], "the test's own arithmetic must be exact"
    values = torch.cat([halves * 2 - 1, torch.tensor([-9.0, 9.0])])
    pixels_BCFYX = values.reshape(1, 1, 1, 1, 5).expand(1, 3, 1, 1, 5)
    assert to_uint8(pixels_BCFYX)[0, 0, :, 0].tolist() == [126, 128, 128, 0, 255]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equal_to_diffusers(dtype):
    generator = torch.Generator().manual_seed(0)
    pixels_BCFYX = (torch.randn(1, 3, 5, 32, 48, generator=generator) * 0.6).to(dtype)
    before = pixels_BCFYX.clone()
    frames = to_uint8(pixels_BCFYX).numpy()
    (expected,) = VideoProcessor(vae_scale_factor=16).postprocess_video(pixels_BCFYX, output_type="pil")
    np.testing.assert_array_equal(frames, np.stack([np.asarray(image) for image in expected]))
    assert torch.equal(pixels_BCFYX, before)


@pytest.mark.parametrize(
    "pixels",
    [
        torch.zeros(2, 3, 1, 4, 4),
        torch.zeros(1, 4, 1, 4, 4),
        torch.zeros(3, 1, 4, 4),
        torch.zeros(1, 3, 1, 4, 4).byte(),
    ],
    ids=["batch", "channels", "no batch", "bytes"],
)
def test_other_tensors_are_refused(pixels):
    with pytest.raises(RequestError, match="pixels must be "):
        to_uint8(pixels)


def test_the_hash_is_that_of_all_bytes_however_they_are_cut(clip):
    whole, chunked = FrameHash(), FrameHash()
    whole.update(clip)
    for chunk in (clip[:1], clip[1:1], clip[1:6], clip[6:]):
        chunked.update(chunk)
    assert whole.hexdigest() == chunked.hexdigest() == hashlib.sha256(clip.tobytes()).hexdigest()


def test_the_hash_sees_content_not_memory_order(clip):
    turned, copied = FrameHash(), FrameHash()
    turned.update(clip[:, ::-1])
    copied.update(clip[:, ::-1].copy())
    assert turned.hexdigest() == copied.hexdigest()


def test_the_hash_refuses_what_the_encoder_refuses(clip):
    with pytest.raises(RequestError):
        FrameHash().update(clip.astype(np.float32))


def test_media_imports_without_torch():
    modules = ", ".join(
        f"cosmos3_core.media.{name}" for name in ("aac", "image", "mp4", "pixels", "probe", "sound", "writer")
    )
    script = f"import {modules}, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
