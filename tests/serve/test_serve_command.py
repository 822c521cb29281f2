"""``omnifp4 serve`` as a person uses it, and its documentation."""
# ruff: noqa: E402 - what is not installed skips the file first

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

openai = pytest.importorskip("openai", reason="openai is not installed")

from omnifp4.cli.main import app

DOCS = (Path(__file__).parents[2] / "docs" / "serve.md").read_text()


def test_started_asked_and_stopped(tiny_artifact: Path) -> None:
    """On a free port, with a key from the environment; Ctrl-C while an answer is under way ends it without a traceback."""
    command = [sys.executable, "-m", "omnifp4", "serve", str(tiny_artifact), "--port", "0", "--device", "cpu", "--name", "it"]  # fmt: skip
    environment = {**os.environ, "OMNIFP4_API_KEY": "sesame", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        told = ""
        while (found := re.search(r"OpenAI base URL: (\S+)", told)) is None:
            line = process.stderr.readline()
            assert line, f"it ended: {told}"
            told += line
        assert "it is ready after" in told and "answers at once" in told and "sesame" not in told
        client = openai.OpenAI(base_url=found[1], api_key="sesame", max_retries=0, timeout=30)
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="wrong").models.list()
        hello: Any = [{"role": "user", "content": "Hello"}]
        stream = client.chat.completions.create(
            model="it", messages=hello, stream=True, max_tokens=8_000, extra_body={"ignore_eos": True}
        )
        pieces = iter(stream)
        for _ in range(3):
            next(pieces)
        process.send_signal(signal.SIGINT)
        with pytest.raises(openai.APIError, match="going down"):
            for _ in pieces:
                pass
        rest = process.communicate(timeout=30)
        assert process.returncode == 130 and "Traceback" not in rest[1], rest
        assert rest[0] == "", "data is what stdout is for"
    finally:
        process.kill()
        process.wait()


def test_the_example_in_the_docs_runs(server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
    code = code.replace("http://127.0.0.1:8000", server.url).replace('"MODEL"', '"tiny-omni"')
    exec(compile(code, "serve.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_options_and_limits_in_the_docs_are_those_there_are() -> None:
    from omnifp4.serve.settings import Limits

    serve = get_command(app).commands["serve"]  # type: ignore[attr-defined]
    known = {option for parameter in serve.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert set(re.findall(r"`(--[a-z-]+)", DOCS)) <= known
    limits = Limits()
    for said in (
        f"| {limits.body_bytes // 10**6} MB; {limits.bodies_bytes // 10**6} MB |",
        f"| {limits.header_bytes // 1024} KB, 100 lines, complete after {limits.header_seconds:g} s |",
        f"| {limits.body_seconds:g} s | 408 |",
        f"| {limits.json_depth} levels,",
        f"| {limits.messages:,} messages, {limits.prompt_characters:,} characters, {limits.media} media,",
        f"| {limits.image_pixels // 10**6} million pixels",
        f"| {limits.audio_seconds:,.0f} s, {limits.video_seconds:g} s; {limits.decode_seconds:g} s of decoding |",
        f"{limits.new_tokens:,} ({limits.default_new_tokens:,} if",
        f"{limits.speech_seconds:g}, {limits.speech_characters:,} characters",
        f"{limits.request_seconds:g} | 504 |",
        f"takes nothing for {limits.write_seconds:g} s | {limits.connections} |",
    ):
        assert said in DOCS, said


def test_refusals(tiny_artifact: Path, tmp_path: Path) -> None:
    """Found before a model is loaded, and told in one line."""
    from typer.testing import CliRunner

    from omnifp4.errors import OmniFP4Error

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, says in (
            (["--engine", "tpu"], "there is no engine 'tpu' (allowed: local, vllm, vllm-omni)"),
            (["--engine", "vllm", "--max-waiting", "3"], "--max-waiting is for the local engine, not for 'vllm'"),
            (["--print"], "--print is for --engine vllm and --engine vllm-omni, not for 'local'"),
            (["--port", port], f"cannot listen on 127.0.0.1 port {port}"),
            (["--host", "203.0.113.1"], "cannot listen on 203.0.113.1 port 8000"),
            (["--allow-media-folder", str(tmp_path / "none")], "is not a folder"),
            (["--allow-media-host", "http://x"], "'http://x', which is no host name"),
            (["--api-key", " "], "the API key is empty"),
            (["--api-key", ""], "the API key is empty"),
        ):
            error = CliRunner().invoke(app, ["serve", str(tiny_artifact), *arguments]).exception
            assert isinstance(error, OmniFP4Error) and says in str(error), error
