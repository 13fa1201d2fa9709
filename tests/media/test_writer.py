"""Formats, and the writer that each gets."""

import pickle

import PIL.Image
import pytest

from cosmos3_core.errors import ClosedError, MediaError, RequestError
from cosmos3_core.media.file_kinds import FILE_KINDS
from cosmos3_core.media.probe import probe_sound, probe_video
from cosmos3_core.media.sound import SoundFormat
from cosmos3_core.media.writer import ClipFormat, ImageWriter, open_writer

STEREO = SoundFormat(48000, 2, 26000)
IMAGES = ("png", "jpeg", "webp")


def clip_format(kind, **settings):
    sound = {"sound": STEREO} if kind == "wav" else {}
    return ClipFormat(kind, 48, 80, 24, **{**sound, **settings})


def test_every_kind_has_its_type_and_ending():
    facts = {kind: (clip_format(kind).media_type, clip_format(kind).suffix) for kind in FILE_KINDS}
    assert facts == {
        "mp4": ("video/mp4", ".mp4"),
        "png": ("image/png", ".png"),
        "jpeg": ("image/jpeg", ".jpg"),
        "webp": ("image/webp", ".webp"),
        "wav": ("audio/wav", ".wav"),
    }
    assert [kind for kind in FILE_KINDS if clip_format(kind).is_image] == list(IMAGES)


def test_a_format_travels_between_processes():
    whole = clip_format("mp4", sound=STEREO, quality=80)
    assert pickle.loads(pickle.dumps(whole)) == whole


@pytest.mark.parametrize("kind", IMAGES)
def test_an_image_of_the_only_frame(tmp_path, clip, kind):
    path = tmp_path / "image"
    with open_writer(path, clip_format(kind)) as writer:
        writer.write(clip[:1])
        assert not path.exists()
    with PIL.Image.open(path) as image:
        assert (image.format.lower(), image.size) == (kind, (80, 48))


def test_an_mp4_with_sound_and_a_wav(tmp_path, clip, waveform):
    with open_writer(tmp_path / "clip.mp4", clip_format("mp4", sound=STEREO)) as writer:
        writer.write_sound(waveform)
        writer.write(clip)
    assert probe_video(tmp_path / "clip.mp4").sound.num_samples == 26000
    with open_writer(tmp_path / "clip.wav", clip_format("wav")) as writer:
        writer.write_sound(waveform)
    assert probe_sound(tmp_path / "clip.wav").num_samples == 26000


def test_the_quality_reaches_the_encoder(tmp_path, clip):
    for quality in (10, 90):
        with open_writer(tmp_path / str(quality), clip_format("jpeg", quality=quality)) as writer:
            writer.write(clip[:1])
    assert (tmp_path / "10").stat().st_size < (tmp_path / "90").stat().st_size


def test_an_image_is_one_frame_without_sound(tmp_path, clip, waveform):
    writer = ImageWriter(tmp_path / "a.webp", "webp", height=48, width=80)
    with pytest.raises(RequestError, match="one frame in all"):
        writer.write(clip)
    with pytest.raises(RequestError, match="left out of this webp"):
        writer.write_sound(waveform)
    writer.write(clip[:1])
    with pytest.raises(RequestError, match="one frame in all"):
        writer.write(clip[:1])
    writer.close()
    writer.close()
    with pytest.raises(ClosedError):
        writer.write(clip[:1])


def test_without_a_frame_there_is_no_image(tmp_path):
    with pytest.raises(MediaError, match="no frame was written"), open_writer(tmp_path / "a", clip_format("jpeg")):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"kind": "gif"}, "kind"),
        ({"kind": "wav"}, "sound"),
        ({"kind": "png", "sound": STEREO}, "sound"),
        ({"kind": "jpeg", "quality": 101}, "quality"),
        ({"kind": "webp", "quality": 90.0}, "quality"),
        ({"kind": "webp", "width": 16384}, "width"),
        ({"kind": "mp4", "sound": SoundFormat(1000, 1, 1)}, "sampling_rate"),
    ],
    ids=lambda value: str(value),
)
def test_wrong_settings_name_the_field_before_there_is_a_file(tmp_path, settings, field):
    with pytest.raises(RequestError) as caught:
        open_writer(tmp_path / "file", ClipFormat(**{"height": 48, "width": 80, "fps": 24, **settings}))
    assert caught.value.field == field
    assert list(tmp_path.iterdir()) == []
