"""Media of many formats are read rightly; each fault is one line."""
# ruff: noqa: E402 - what is not installed skips the file first

from __future__ import annotations

import http.server
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

for _needed in ("PIL", "soundfile", "soxr", "av"):
    pytest.importorskip(_needed, reason=f"{_needed} is not installed")

import chat_media as made

from omnifp4.chat.errors import MediaError
from omnifp4.chat.media import MediaRules, load_media
from omnifp4.chat.messages import normalise


def load(kind: str, source: Any, rules: MediaRules | None = None, **extra: Any) -> Any:
    messages, notes = load_media(normalise([{"type": kind, kind: source, **extra}]), rules or MediaRules())
    part = messages[0]["content"][0]
    return (part[kind], notes) if notes else part[kind]


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_image_formats(form: str) -> None:
    image = load("image", made.image_bytes(form))
    assert (image.mode, image.size) == ("RGB", (96, 64))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_image_modes(mode: str) -> None:
    form = "JPEG" if mode == "CMYK" else "PNG"
    assert load("image", made.image_bytes(form, mode)).mode == "RGB"


def test_image_ways(tmp_path: Path) -> None:
    from PIL import Image

    data = made.image_bytes()
    path = tmp_path / "a b.png"
    path.write_bytes(data)
    array = made.picture()
    sources = [data, str(path), path, path.as_uri(), made.data_url("image/png", data), array, Image.fromarray(array)]
    sources += [array.transpose(2, 0, 1), array.astype(np.float32) / 255]
    for source in sources:
        assert (np.asarray(load("image", source)) == array).all(), type(source)


def test_transparency_lies_on_white_and_16_bits_are_scaled() -> None:
    from PIL import Image

    clear = Image.fromarray(np.zeros((8, 8, 4), np.uint8))
    assert (np.asarray(load("image", clear)) == 255).all()
    deep = Image.fromarray(np.full((8, 8), 32768, np.uint16))
    assert (np.asarray(load("image", deep)) == 128).all()


def test_photos_are_turned_upright() -> None:
    import io

    from PIL import Image

    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(made.picture()).save(file, "JPEG", exif=exif)
    assert load("image", file.getvalue()).size == (64, 96)


def test_stereo_files_are_mixed() -> None:
    import io

    import soundfile

    file, wave = io.BytesIO(), made.tone()
    soundfile.write(file, np.stack([wave, -wave], 1), made.SECOND, format="WAV")
    assert np.abs(load("audio", file.getvalue())).max() < 1e-4


@pytest.mark.parametrize("form", ["WAV", "FLAC", "OGG", "MP3", "AIFF"])
@pytest.mark.parametrize("rate", [8000, 16_000, 44_100])
def test_audio_formats(form: str, rate: int) -> None:
    samples = load("audio", made.wav_bytes(1.0, rate, form))
    assert samples.dtype == np.float32 and samples.ndim == 1
    assert abs(len(samples) - made.SECOND) < made.SECOND // 10
    # The tone is still a tone of the same pitch.
    spectrum = np.abs(np.fft.rfft(samples[1000:9000]))
    assert abs(int(spectrum.argmax()) * made.SECOND / 8000 - 440) < 5


def test_audio_through_av(tmp_path: Path) -> None:
    import av

    path = tmp_path / "a.m4a"
    with av.open(str(path), "w", format="ipod") as container:
        stream: Any = container.add_stream("aac", rate=44_100, layout="mono")
        frame = av.AudioFrame.from_ndarray(made.tone(1.0, 44_100)[None], format="fltp", layout="mono")
        frame.sample_rate = 44_100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    samples = load("audio", path)
    assert abs(len(samples) - made.SECOND) < 2000 and samples.std() > 0.2


def test_audio_that_costs_more_than_it_is_worth() -> None:
    """Many channels are mixed in small blocks; rates that nobody records at, and what takes too long, are refused."""
    import io
    import tracemalloc

    import soundfile

    file = io.BytesIO()
    soundfile.write(file, np.zeros((made.SECOND, 1024), np.int16), made.SECOND, format="WAV", subtype="PCM_U8")
    tracemalloc.start()
    assert len(load("audio", file.getvalue())) == made.SECOND
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40_000_000, "the file's own 16 MB twice, and no float32 of all channels"
    for rate in (999, 768_001):
        with pytest.raises(MediaError, match=f"sampling rate of {rate} .allowed: 1,000 to 768,000 a second"):
            load("audio", made.wav_bytes(0.5, rate))
    for kind, data in (("audio", made.wav_bytes(1.0)), ("audio", made.wav_bytes(1.0, form="AIFF"))):
        with pytest.raises(MediaError, match="takes more than 0 s to decode"):
            load(kind, data, MediaRules(max_decode_seconds=0))


def test_audio_arrays() -> None:
    wave = made.tone()
    assert (load("audio", wave) == wave).all()
    stereo = np.stack([wave, -wave], 1)
    assert np.abs(load("audio", stereo)).max() == 0
    assert np.abs(load("audio", stereo.T)).max() == 0
    whole = (wave * 32767).astype(np.int16)
    assert np.abs(load("audio", whole) - wave).max() < 1e-4
    for source in ((made.tone(1, 48_000), 48_000), (48_000, made.tone(1, 48_000))):
        assert abs(len(load("audio", source)) - made.SECOND) <= 1
    assert abs(len(load("audio", made.tone(1, 8000), sampling_rate=8000)) - made.SECOND) <= 1


def test_audio_equals_the_official_helper(transformers: Any, tmp_path: Path) -> None:
    try:
        from qwen_omni_utils import process_audio_info
    except Exception as error:
        pytest.skip(f"qwen-omni-utils does not import: {error}")
    path = tmp_path / "a.wav"
    path.write_bytes(made.wav_bytes(1.3, 44_100))
    (theirs,) = process_audio_info([{"role": "user", "content": [{"type": "audio", "audio": str(path)}]}], False)
    ours = load("audio", path)
    count = min(len(ours), len(theirs))
    assert abs(len(ours) - len(theirs)) <= 1
    # The same filter, in blocks: rounding of float32.
    assert np.abs(ours[:count] - theirs[:count]).max() < 1e-5


def test_video_frames_and_sound(tmp_path: Path) -> None:
    video = load("video", made.video_file(tmp_path / "a.mp4", seconds=3, sound=True))
    assert video.frames.shape == (6, 3, 48, 64) and video.frames.dtype == np.uint8
    brightness = video.frames.mean((1, 2, 3))
    assert (np.diff(brightness) > 20).all(), "two frames a second, in order"
    assert video.sound is not None and abs(len(video.sound) - 3 * made.SECOND) < 3000
    assert load("video", tmp_path / "a.mp4", sound=False).sound is None
    assert load("video", made.video_file(tmp_path / "b.mp4")).sound is None


def test_slow_videos_show_frames_as_long_as_they_last(tmp_path: Path) -> None:
    video = load("video", made.video_file(tmp_path / "a.mp4", seconds=4, rate=1))
    assert len(video.frames) == 8
    assert (video.frames[0] == video.frames[1]).all() and (video.frames[1] != video.frames[2]).any()


def test_long_videos_get_smaller_frames(tmp_path: Path) -> None:
    path = made.video_file(tmp_path / "a.mp4", seconds=10, rate=2, width=320, height=240)
    video = load("video", path, MediaRules(max_video_tokens=100))
    assert len(video.frames) == 20
    assert video.frames.shape[2] * video.frames.shape[3] <= 10 * 1024


@pytest.mark.parametrize(("width", "height"), [(19_900, 100), (40, 8_000), (9_999, 50), (64, 48)])
def test_scaled_frames_are_not_too_thin(width: int, height: int) -> None:
    """The processor fails where one side is more than 200 times the other, and rounding down makes them thinner."""
    from omnifp4.chat.video import frame_size

    for tokens in (4, 100, 777, 24_000):
        size = frame_size(width, height, 20, tokens)
        assert max(size) <= 200 * min(size)


def test_video_arrays() -> None:
    frames = np.stack([made.picture(seed=number) for number in range(3)])
    video = load("video", frames)
    assert video.frames.shape == (4, 3, 64, 96), "an even number"
    assert (video.frames[0] == frames[0].transpose(2, 0, 1)).all()
    assert (load("video", list(frames)).frames == video.frames).all()
    assert (load("video", frames.transpose(0, 3, 1, 2)).frames == video.frames).all()


def truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


FAULTS: list[tuple[str, str, Callable[[], Any], str]] = [
    ("image", "truncated png", lambda: truncated(made.image_bytes()), "damaged"),
    ("image", "truncated jpeg", lambda: truncated(made.image_bytes("JPEG")), "damaged"),
    ("image", "garbage", lambda: b"\x00\x01\x02\x03" * 50, "damaged or no image"),
    ("image", "200 megapixels", lambda: made.png_bomb(20_000, 10_000), "pixels"),
    (
        "image",
        "90 megapixels",
        lambda: made.png_bomb(10_000, 9_000),
        "10000 x 9000 = 90,000,000 pixels; the limit is 89",
    ),
    ("image", "a line", lambda: made.png_bomb(5000, 1), "200 times"),
    ("image", "empty", lambda: b"", "0 bytes"),
    ("image", "text", lambda: b"<html><body>not found</body></html>", "holds text, not image"),
    ("image", "pdf", lambda: b"%PDF-1.7 and so on", "holds application/pdf"),
    ("image", "sound", lambda: made.wav_bytes(), "holds audio/wav, not image (pass it as audio)"),
    (
        "image",
        "declared sound",
        lambda: made.data_url("audio/wav", made.image_bytes()),
        "declared audio/wav, but the content is image/png",
    ),
    ("image", "bad base64", lambda: "data:image/png;base64,@@@@", "base64 is damaged"),
    ("image", "no base64", lambda: "data:image/png,abc", "not base64"),
    ("image", "eps", lambda: b"\xc5\xd0\xd3\xc6" + b"\x00" * 60, "damaged or no image"),
    ("video", "playlist", lambda: b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "holds text, not video"),
    ("image", "shape", lambda: np.zeros((3, 3, 3, 3), np.uint8), "no image"),
    ("image", "values", lambda: np.full((8, 8, 3), 200.0), "outside [0, 1]"),
    ("image", "integers", lambda: np.zeros((8, 8, 3), np.int32), "not read"),
    ("audio", "empty", lambda: made.wav_bytes(0.0), "zero"),
    ("audio", "empty array", lambda: np.zeros(0, np.float32), "zero"),
    ("audio", "empty mp3", lambda: made.wav_bytes(0.0, form="MP3"), "audio"),
    ("audio", "blink", lambda: made.tone(0.01), "10.0 ms"),
    ("audio", "truncated flac", lambda: made.wav_bytes(form="FLAC")[:60], "damaged"),
    ("audio", "broken wav", lambda: b"RIFF\xff\xff\xff\xffWAVEjunkjunkjunk", "damaged"),
    ("audio", "picture", lambda: made.image_bytes(), "holds image/png, not audio (pass it as image)"),
    ("audio", "wrong mime", lambda: made.data_url("audio/wav", made.image_bytes()), "wrong MIME type"),
    ("audio", "not a number", lambda: np.full(1000, np.nan, np.float32), "not finite"),
    ("audio", "too loud", lambda: np.full(1000, 1e30, np.float32), "samples of 1.0e+30 (sound lies between -1 and 1)"),
    ("audio", "ragged", lambda: [[0.1, 0.2], [0.3]], "a value of type list is no audio"),
    ("image", "ragged", lambda: [[1, 2], [3]], "a value of type list is no image"),
    ("audio", "rate", lambda: (np.zeros(1000, np.float32), 3), "sampling rate is 3"),
    ("audio", "one hour", lambda: made.long_wav(3600), "lasts 3600 s; the limit is 2400 s"),
    ("audio", "one hour array", lambda: (np.zeros(3600 * 8000, np.int8), 8000), "lasts 3600 s; the limit is 2400 s"),
    ("audio", "shape", lambda: np.zeros((100, 100), np.float32), "no audio"),
    ("video", "garbage", lambda: b"\x00\x00\x00\x18ftypisom" + b"\x00" * 100, "damaged or no video"),
    ("video", "sound", lambda: made.wav_bytes(), "holds audio/wav, not video"),
    ("video", "no frames", list, "no frames"),
    ("video", "a line", lambda: [made.picture(width=900, height=4)] * 2, "a frame of the video is 900 x 4; the longer"),
    ("video", "frames differ", lambda: [made.picture(), made.picture(width=64)], "differ in shape"),
    ("image", "missing", lambda: "no/such/file.png", "does not exist"),
    ("image", "folder", lambda: ".", "is not a file"),
    ("image", "nul", lambda: "a\0b", "not a path"),
    ("image", "long name", lambda: "x" * 5000, "not a path"),
    ("image", "url", lambda: "https://example.org/a.png", "is not allowed: only local files and data URLs"),
    ("image", "scheme", lambda: "s3://bucket/a.png", "s3:// addresses are not read"),
    ("image", "type", lambda: object(), "image"),
]


@pytest.mark.parametrize(
    ("kind", "name", "source", "says"), FAULTS, ids=[f"{kind} {name}" for kind, name, _, _ in FAULTS]
)
def test_each_fault_is_one_line(kind: str, name: str, source: Callable[[], Any], says: str) -> None:
    with pytest.raises(MediaError) as told:
        load(kind, source())
    assert says in str(told.value)
    assert "\n" not in str(told.value) and len(str(told.value)) < 400


def test_playlists_open_nothing_else(tmp_path: Path) -> None:
    """A playlist that does not look like text names a file that FFmpeg could read."""
    inner = made.video_file(tmp_path / "inner.ts", seconds=2)
    script = f"#EXTM3U\n#\xe9\xff\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{inner}\n#EXT-X-ENDLIST\n".encode("latin-1")
    path = tmp_path / "list.m3u8"
    path.write_bytes(script)
    import av

    with av.open(str(path)) as container:
        assert container.format.name == "hls", "FFmpeg alone follows it"
    for source in (path, script):
        with pytest.raises(MediaError, match="damaged or no video"):
            load("video", source)
        with pytest.raises(MediaError, match="damaged or no audio"):
            load("audio", source)


def test_a_video_is_no_audio(tmp_path: Path) -> None:
    path = made.video_file(tmp_path / "a.mp4", sound=True)
    with pytest.raises(MediaError, match="is a video"):
        load("audio", path)
    with pytest.raises(MediaError, match="damaged"):
        load("video", truncated(path.read_bytes()))


def test_long_media_are_trimmed_when_asked(tmp_path: Path) -> None:
    rules = MediaRules(max_audio_seconds=2, max_video_seconds=2, long_media="trim")
    samples, notes = load("audio", made.wav_bytes(3.0, 44_100), rules)
    assert len(samples) == 2 * made.SECOND and "only the first 2 s" in notes[0]
    path = made.video_file(tmp_path / "a.mp4", seconds=4, sound=True)
    video, notes = load("video", path, rules)
    assert len(video.frames) == 4 and len(video.sound) == 2 * made.SECOND and "only the first 2 s" in notes[0]
    with pytest.raises(MediaError, match="lasts 4 s; the limit is 2 s"):
        load("video", path, MediaRules(max_video_seconds=2))
    with pytest.raises(MediaError, match="allowed: refuse, trim"):
        MediaRules(long_media="cut")  # type: ignore[arg-type]


def test_files_can_be_forbidden_or_fenced(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir(), outside.mkdir()
    (inside / "a.png").write_bytes(made.image_bytes())
    (outside / "b.png").write_bytes(made.image_bytes())
    (inside / "link.png").symlink_to(outside / "b.png")
    fenced = MediaRules(allow_files=inside)
    assert load("image", inside / "a.png", fenced).size == (96, 64)
    for path in (outside / "b.png", inside / ".." / "out" / "b.png", inside / "link.png", inside / ".." / "none"):
        with pytest.raises(MediaError, match="outside the folder"):
            load("image", str(path), fenced)
    for source in (inside / "a.png", str(inside / "a.png"), (inside / "a.png").as_uri()):
        with pytest.raises(MediaError, match="local files are not allowed"):
            load("image", source, MediaRules(allow_files=False))


def test_size_limit() -> None:
    for source in (made.image_bytes(), made.data_url("image/png", made.image_bytes())):
        with pytest.raises(MediaError, match="limit of 100"):
            load("image", source, MediaRules(max_bytes=100))


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/away":
                self.send_response(302)
                self.send_header("Location", "http://localhost:1/a.png")
                self.end_headers()
                return
            self.send_response(200 if self.path == "/a.png" else 404)
            self.end_headers()
            self.wfile.write(made.image_bytes())

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{web.server_address[1]}"
        web.shutdown()


def test_urls_when_allowed(server: str) -> None:
    assert load("image", f"{server}/a.png", MediaRules(allow_urls=True)).size == (96, 64)
    only = MediaRules(allow_urls=["127.0.0.1"])
    assert load("image", f"{server}/a.png", only).size == (96, 64)
    with pytest.raises(MediaError, match="404"):
        load("image", f"{server}/b.png", only)
    with pytest.raises(MediaError, match="the host 'localhost' is not allowed"):
        load("image", f"{server}/away", only)
    with pytest.raises(MediaError, match="limit of 100 "):
        load("image", f"{server}/a.png", MediaRules(allow_urls=True, max_bytes=100))


def test_decoded_media_are_not_read_again() -> None:
    once, _ = load_media(normalise([{"type": "image", "image": made.picture()}]), MediaRules())
    twice, _ = load_media(once, MediaRules())
    assert twice[0]["content"][0]["image"] is once[0]["content"][0]["image"]
