"""Load on a server: what is sent, when, and whether the figures are those of the answers."""

from __future__ import annotations

import base64
import io
import itertools
import json
import subprocess
import sys
import wave
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console
from server_stand_in import EACH_S, FIRST_S, SOUND_SECONDS, Behaviour, serving

from omnifp4.benchmark.server import Arrivals, Kind, TraceOptions, bench_server, parse_mix, server_load_text
from omnifp4.benchmark.server.client import parse_server
from omnifp4.benchmark.server.figures import spread
from omnifp4.benchmark.server.samples import picture_sample, sound_sample, video_sample
from omnifp4.benchmark.server.trace import plan_trace
from omnifp4.errors import OmniFP4Error
from omnifp4.receipt.server_load import ServerLoadReceipt


def text_of(receipt: ServerLoadReceipt) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(server_load_text(receipt))
    return console.export_text()


def test_times_are_those_of_the_answers() -> None:
    behaviour = Behaviour()
    with serving(behaviour) as url:
        receipt = bench_server(url, TraceOptions(requests=6, concurrency=2, max_tokens=5))
    figures = receipt.all_kinds
    assert (figures.requests, figures.failed, receipt.output_tokens, receipt.prompt_tokens) == (6, 0, 30, 30)
    assert (receipt.model, receipt.engine, receipt.tokens_counted, receipt.streamed) == (
        "tiny",
        "stand-in 1.2",
        "usage",
        True,
    )
    # The role comes first and at once; it is no token.
    assert figures.ttft_s.least is not None and figures.ttft_s.least >= FIRST_S
    assert figures.tpot_s.least is not None and figures.tpot_s.least >= EACH_S
    whole = FIRST_S + 4 * EACH_S
    assert figures.end_to_end_s.least is not None and figures.end_to_end_s.least >= whole
    assert figures.end_to_end_s.most is not None
    assert receipt.wall_s >= 3 * whole
    assert receipt.output_tokens_per_s == pytest.approx(30 / receipt.wall_s)
    assert behaviour.most_at_once == 2
    # One request to warm up, and no two alike.
    texts = [body["messages"][0]["content"] for body in behaviour.bodies]
    assert len(texts) == len(set(texts)) == 7


@pytest.mark.parametrize("sound", ["pcm", "wav"])
def test_speech_is_timed_against_its_length(sound: str) -> None:
    with serving(Behaviour(sound=sound)) as url:
        receipt = bench_server(url, TraceOptions(requests=2, mix={Kind.SPEECH: 1}, max_tokens=3))
    (row,) = receipt.kinds
    assert receipt.audio_seconds == pytest.approx(2 * SOUND_SECONDS)
    assert row.speech_rtf.p50 is not None and row.first_sound_s.p50 is not None
    assert row.speech_rtf.p50 >= (FIRST_S + 2 * EACH_S) / SOUND_SECONDS
    assert row.first_sound_s.p50 >= FIRST_S + 2 * EACH_S
    # Sound is no text: the count of tokens is that of the words.
    assert row.tokens == 6
    assert "1.0 s of speech" in text_of(receipt)


def test_every_kind_is_sent_as_openai_has_it() -> None:
    behaviour = Behaviour()
    mix = {Kind.TEXT: 2.0, Kind.IMAGE: 1.0, Kind.AUDIO: 1.0}
    with serving(behaviour) as url:
        receipt = bench_server(url, TraceOptions(requests=8, mix=mix, max_tokens=1, warmup=0))
    assert receipt.trace.mix == {"text": 4, "image": 2, "audio": 2}
    parts = [part for body in behaviour.bodies if not isinstance(body["messages"][0]["content"], str) for part in body["messages"][0]["content"]]  # fmt: skip
    assert Counter(part["type"] for part in parts) == {"text": 4, "image_url": 2, "input_audio": 2}
    url = next(part["image_url"]["url"] for part in parts if part["type"] == "image_url")
    head, _, coded = url.partition(",")
    assert head == "data:image/png;base64" and base64.b64decode(coded).startswith(b"\x89PNG")
    sound = next(part["input_audio"] for part in parts if part["type"] == "input_audio")
    with wave.open(io.BytesIO(base64.b64decode(sound["data"]))) as file:
        assert (sound["format"], file.getframerate(), file.getnframes()) == ("wav", 16_000, 16_000)


def test_videos_are_read_and_differ() -> None:
    av = pytest.importorskip("av", reason="PyAV is not installed")
    made = []
    for seed in (0, 0, 1):
        with av.open(io.BytesIO(video_sample(seed, seconds=1.5))) as container:
            (stream,) = container.streams
            assert (stream.codec_context.name, stream.average_rate, stream.frames) == ("mjpeg", 4, 6)
            made.append(b"".join(frame.to_ndarray(format="gray").tobytes() for frame in container.decode(stream)))
    assert made[0] == made[1] != made[2]
    assert len(made[0]) == 6 * 96 * 64
    # It moves: not all pictures are alike.
    assert len({made[0][begin : begin + 96 * 64] for begin in range(0, len(made[0]), 96 * 64)}) > 1


def test_samples_are_pictures_and_differ() -> None:
    image = pytest.importorskip("PIL.Image")
    opened = image.open(io.BytesIO(picture_sample(1)))
    opened.load()
    assert (opened.size, opened.mode) == ((96, 64), "RGB")
    assert picture_sample(1) == picture_sample(1) != picture_sample(2)
    assert sound_sample(1) != sound_sample(2)


def test_a_file_is_sent_in_place_of_a_sample(tmp_path: Path) -> None:
    file = tmp_path / "a.jpg"
    file.write_bytes(b"picture")
    options = TraceOptions(requests=1, mix={Kind.IMAGE: 1}, files={Kind.IMAGE: (file,)})
    (request,) = plan_trace(options)
    part = request.body["messages"][0]["content"][0]
    assert part["image_url"]["url"] == "data:image/jpeg;base64," + base64.b64encode(b"picture").decode()


def test_a_trace_is_the_same_for_the_same_seed() -> None:
    def trace(**changes: object) -> list[tuple[float, str, str]]:
        options = TraceOptions(requests=40, rate_per_s=10.0, mix=parse_mix("text=3,image=1"), **changes)  # type: ignore[arg-type]
        return [(r.arrives_s, r.kind.value, json.dumps(r.body)) for r in plan_trace(options)]

    assert trace() == trace()
    assert trace() != trace(seed=1)


@pytest.mark.parametrize("arrivals", list(Arrivals))
def test_arrivals_have_the_stated_rate(arrivals: Arrivals) -> None:
    times = [r.arrives_s for r in plan_trace(TraceOptions(requests=400, rate_per_s=20.0, arrivals=arrivals))]
    assert times == sorted(times) and times[0] == 0.0
    assert len(times) / times[-1] == pytest.approx(20.0, rel=0.25)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    if arrivals is Arrivals.CONSTANT:
        assert max(gaps) == pytest.approx(0.05)
    elif arrivals is Arrivals.POISSON:
        # An exponential distribution: its deviation is its mean.
        mean = sum(gaps) / len(gaps)
        assert (sum((g - mean) ** 2 for g in gaps) / len(gaps)) ** 0.5 == pytest.approx(mean, rel=0.2)
    else:
        assert sum(gap == 0.0 for gap in gaps) == 350


def test_a_rate_that_is_not_held_is_told() -> None:
    with serving(Behaviour()) as url:
        receipt = bench_server(url, TraceOptions(requests=8, rate_per_s=200.0, concurrency=1, max_tokens=4))
    assert receipt.waited_s.most is not None and receipt.waited_s.most > 0.2
    assert "the stated rate was not held" in text_of(receipt)


@pytest.mark.parametrize(
    ("mode", "error"),
    [
        ("status-500", "status 500: request … failed"),
        ("broken", "the stream broke off before [DONE]"),
        ("error-event", "error in the stream: out of memory"),
        ("html", "an answer that is no JSON"),
        ("empty", "an empty answer"),
        ("silent", "silent for 0 s"),
    ],
)
def test_failures_are_counted_by_what_went_wrong(mode: str, error: str) -> None:
    behaviour = Behaviour(mode=mode)
    with serving(behaviour) as url:
        receipt = bench_server(url, TraceOptions(requests=3, warmup=0, max_tokens=2), timeout_s=0.3)
    assert receipt.errors == {error: 3}
    assert (receipt.all_kinds.failed, receipt.output_tokens, receipt.all_kinds.ttft_s.count) == (3, 0, 0)
    assert f"FAILED 3: {error}" in text_of(receipt)


def test_some_failures_leave_the_figures_of_the_others() -> None:
    with serving(Behaviour(fail_every=2)) as url:
        receipt = bench_server(url, TraceOptions(requests=6, warmup=0, max_tokens=2, concurrency=1))
    assert (receipt.all_kinds.failed, receipt.output_tokens, receipt.all_kinds.ttft_s.count) == (3, 6, 3)


def test_a_server_without_usage_or_streaming_is_measured_as_it_is() -> None:
    with serving(Behaviour(usage=False)) as url:
        receipt = bench_server(url, TraceOptions(requests=2, max_tokens=4))
    assert (receipt.tokens_counted, receipt.output_tokens) == ("pieces", 8)
    with serving(Behaviour(mode="whole")) as url:
        receipt = bench_server(url, TraceOptions(requests=2))
    assert (receipt.streamed, receipt.output_tokens, receipt.all_kinds.tpot_s.count) == (False, 6, 0)
    assert "not streamed" in text_of(receipt)


def test_no_server_no_key_no_answer() -> None:
    with pytest.raises(OmniFP4Error, match="no server answers at"):
        bench_server("http://127.0.0.1:9")
    with serving(Behaviour(key="k")) as url:
        with pytest.raises(OmniFP4Error, match="wants an API key"):
            bench_server(url)
        assert bench_server(url, TraceOptions(requests=1, max_tokens=1), key="k").all_kinds.failed == 0
    with (
        serving(Behaviour(mode="status-500")) as url,
        pytest.raises(OmniFP4Error, match="every request of the warm-up"),
    ):
        bench_server(url)


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://h:notaport", "http://h:99999"])
def test_a_url_that_is_none(url: str) -> None:
    with pytest.raises(OmniFP4Error, match="server"):
        parse_server(url)


def test_urls_are_read_with_or_without_v1() -> None:
    assert parse_server("127.0.0.1:8000/v1/").url == "http://127.0.0.1:8000"
    assert parse_server("https://a.b/c").url == "https://a.b:443/c"
    assert parse_server("http://user:word@h:1").url == "http://h:1", "a key in the URL must not be shown"
    assert parse_server("http://[::1]:5").url == "http://[::1]:5"


@pytest.mark.parametrize("mix", ["", "smell=1", "text=-1", "text=x", "text=0", "text=inf"])
def test_a_mix_that_is_none(mix: str) -> None:
    with pytest.raises(OmniFP4Error, match="mix"):
        parse_mix(mix)


def test_percentiles_are_values_that_were_seen() -> None:
    found = spread([*range(1, 101), None])
    assert (found.count, found.p50, found.p90, found.p99, found.least, found.most) == (100, 50, 90, 99, 1, 100)
    assert spread([None]) == spread([])
    assert spread([3.0]).p99 == 3.0


def test_the_verb(tmp_path: Path) -> None:
    out = tmp_path / "load.json"
    with serving(Behaviour()) as url:
        command = [sys.executable, "-m", "omnifp4", "bench", "--server", url, "--requests", "3", "--max-tokens", "2"]
        done = subprocess.run([*command, "--receipt", str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "3 requests" in done.stdout and "tokens/s" in done.stdout
    assert ServerLoadReceipt.model_validate_json(out.read_text()).output_tokens == 6
