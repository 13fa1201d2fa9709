"""Pixel <-> latent <-> token arithmetic."""

from fractions import Fraction

import pytest

from cosmos3_core.shapes import (
    Geometry,
    LatentShape,
    TokenGrid,
    frame_rate,
    num_sound_latents,
    pixel_to_latent_shape,
    sound_samples,
)

WAN22 = Geometry()
# Another family's numbers, so that nothing can lean on Wan 2.2's.
OTHER = Geometry(temporal=8, spatial=8, channels=16, patch=3)

SIZES = [  # frames, rows, columns -> latent -> tokens
    ((1, 960, 960), (1, 60, 60), (1, 30, 30)),
    ((189, 720, 1280), (48, 45, 80), (48, 23, 40)),  # 45 rows are odd: padded to 23 patches
    ((93, 480, 832), (24, 30, 52), (24, 15, 26)),
    ((5, 16, 16), (2, 1, 1), (2, 1, 1)),
    ((5, 48, 80), (2, 3, 5), (2, 2, 3)),  # odd both ways
]


@pytest.mark.parametrize(("pixels", "latent", "tokens"), SIZES)
def test_published_sizes(pixels, latent, tokens):
    assert WAN22.latent_shape(*pixels) == LatentShape(*latent)
    assert WAN22.token_grid(LatentShape(*latent)) == TokenGrid(*tokens)
    assert WAN22.num_tokens(*pixels) == tokens[0] * tokens[1] * tokens[2]


def test_720p_has_44160_tokens():
    assert WAN22.num_tokens(189, 720, 1280) == 48 * 23 * 40 == 44160


@pytest.mark.parametrize(("pixels", "latent", "tokens"), SIZES)
def test_the_public_function_gives_the_same_as_a_plain_tuple(pixels, latent, tokens):
    shape = pixel_to_latent_shape(*pixels)
    assert type(shape) is tuple
    assert shape == latent == tuple(WAN22.latent_shape(*pixels))


@pytest.mark.parametrize("geometry", [WAN22, OTHER])
def test_frames_survive_the_round_trip(geometry):
    for num_latent_frames in range(1, 60):
        num_frames = geometry.num_pixel_frames(num_latent_frames)
        assert geometry.latent_shape(num_frames, 48, 48).num_frames == num_latent_frames
        assert geometry.round_up_num_frames(num_frames) == num_frames


@pytest.mark.parametrize("geometry", [WAN22, OTHER])
def test_rounding_up_gives_the_next_length_that_the_vae_can_produce(geometry):
    producible = [geometry.num_pixel_frames(count) for count in range(1, 60)]
    for num_frames in range(1, 230):
        assert geometry.round_up_num_frames(num_frames) == next(count for count in producible if count >= num_frames)


@pytest.mark.parametrize(("asked", "given"), [(1, 1), (2, 5), (5, 5), (6, 9), (121, 121), (188, 189), (189, 189)])
def test_rounding_up_in_numbers(asked, given):
    assert WAN22.round_up_num_frames(asked) == given


def test_patches_cover_the_grid_and_no_more():
    for rows in range(1, 40):
        grid = OTHER.token_grid(LatentShape(2, rows, 1))
        assert grid.num_frames == 2
        assert (grid.height - 1) * OTHER.patch < rows <= grid.height * OTHER.patch


def test_a_geometry_is_a_value():
    assert Geometry() == Geometry(temporal=4, spatial=16, channels=48, patch=2)
    assert len({Geometry(), Geometry(), OTHER}) == 2
    with pytest.raises(AttributeError):
        WAN22.temporal = 8


@pytest.mark.parametrize(
    ("num_frames", "fps", "sampling_rate", "expected"),
    [
        (189, 24, 48000, 378000),
        (189, 24.0, 44100, 347287),  # 347287.5
        (1, 24, 48000, 2000),
        (189, 23.976, 48000, 378378),  # 24000/1001 fps; 378378.378... at 23.976
        (189, Fraction(24000, 1001), 48000, 378378),
        (300, 29.97, 48000, 480480),
        (7, 12.5, 16000, 8960),
        (0, 24, 48000, 0),
    ],
)
def test_sound_samples_are_the_whole_ones_that_fit(num_frames, fps, sampling_rate, expected):
    num_samples = sound_samples(num_frames, fps, sampling_rate)
    assert type(num_samples) is int
    assert num_samples == expected
    assert (
        Fraction(num_samples, sampling_rate) <= num_frames / frame_rate(fps) < Fraction(num_samples + 1, sampling_rate)
    )


@pytest.mark.parametrize(
    ("num_frames", "fps", "expected"),
    [
        (189, 24, 197),  # 196.875
        (24, 24, 25),  # exactly a second: not one more
        (1, 24, 2),  # 1.04
        (109, 12.5, 218),  # exactly; in floats 109 / 12.5 * 48000 is a little less
        (1001, 23.976, 1044),  # 24000/1001 frames a second: 1043.75...
        (48, 24, 50),
        (49, 24, 52),
    ],
)
def test_sound_latents_cover_the_clip_and_no_more(num_frames, fps, expected):
    assert num_sound_latents(num_frames, fps, 25.0) == expected
    rate = frame_rate(fps)
    assert (expected - 1) * rate < num_frames * 25 <= expected * rate
