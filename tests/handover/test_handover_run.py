"""The hand-over from beginning to end, against stand-in engines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from handover_machines import Heard, gpu
from stand_in_engine import FAILURES

from omnifp4.benchmark.server.client import is_healthy, parse_server
from omnifp4.errors import OmniFP4Error
from omnifp4.handover import process, serve_with
from omnifp4.handover.causes import find_causes
from omnifp4.receipt.base import Verdict
from omnifp4.receipt.handover import HandoverReceipt

Here = Callable[..., None]
Given = dict[str, Any]


def run(model: Path, engine: str, port: int, options: Given) -> tuple[int, str]:
    talk = Heard()
    status = serve_with(str(model), engine, host="127.0.0.1", port=port, print_only=False, options=options, talk=talk)
    return status, talk.text


def receipt_of(options: Given, engine: str, port: int) -> HandoverReceipt:
    folder = options["cache"] / "handover" / f"{engine}-{port}"
    return HandoverReceipt.model_validate_json((folder / "handover.json").read_text())


def test_vllm_serves_and_is_proven(
    compressed: Path, free_port: int, options: Given, here: Here, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    here(gpu())
    monkeypatch.setenv("STAND_IN_RECORD", str(tmp_path / "record.json"))
    status, text = run(compressed, "vllm", free_port, options)
    assert status == 0, text
    receipt = receipt_of(options, "vllm", free_port)
    assert receipt.verdict is Verdict.PASS
    used = {(use.part, use.kernel): use.arithmetic for use in receipt.kernels}
    assert used == {
        ("experts", "MARLIN"): "W4A16",
        ("linears", "MarlinNvFp4LinearKernel"): "W4A16",
        ("attention", "FLASH_ATTN"): "",
    }
    (memory,) = receipt.memory
    assert (memory.weights_gib, memory.cache_gib, memory.cache_tokens) == (16.91, 104.2, 1_138_112)
    assert {row.kind for row in receipt.smoke} == {"text", "image", "audio", "video"}
    assert all(row.tokens == 8 and row.tokens_per_s for row in receipt.smoke if row.verdict is Verdict.PASS)
    record = json.loads((tmp_path / "record.json").read_text())
    # vLLM-Omni is installed beside this vLLM, and must not replace its models.
    assert record["plugins"] == ""
    assert record["arguments"][:2] == ["serve", str(compressed)]
    assert "experts: MARLIN (W4A16)" in text
    assert not is_healthy(parse_server(receipt.url)), "the engine was left running"


def test_vllm_omni_speaks(modelopt: Path, free_port: int, options: Given, here: Here) -> None:
    here(gpu())
    status, text = run(modelopt, "vllm-omni", free_port, options)
    assert status == 0, text
    receipt = receipt_of(options, "vllm-omni", free_port)
    assert receipt.converted_because == ""
    speech = next(row for row in receipt.smoke if row.kind == "speech")
    assert speech.verdict is Verdict.PASS
    assert speech.speech_rtf is not None and speech.speech_rtf > 0
    assert "1.0 s of sound" in speech.detail
    assert '"seed": 0' in receipt.files["deploy.yaml"]


def test_modelopt_is_converted_once_for_plain_vllm(modelopt: Path, free_port: int, options: Given, here: Here) -> None:
    here(gpu())
    options["smoke"] = False
    status, text = run(modelopt, "vllm", free_port, options)
    assert status == 0
    assert "converting to compressed-tensors: vLLM 0.26 to 0.33 builds the thinker's lm_head without a name" in text
    receipt = receipt_of(options, "vllm", free_port)
    copy = Path(receipt.served)
    assert json.loads((copy / "config.json").read_text())["quantization_config"]["quant_method"] == "compressed-tensors"
    assert f"--served-model-name {modelopt.name} " in receipt.command
    written = copy.stat().st_mtime_ns
    status, text = run(modelopt, "vllm", free_port, options)
    assert (status, copy.stat().st_mtime_ns) == (0, written)
    assert "converted copy of an earlier run" in text
    # No request was sent, so nothing is proven.
    assert receipt_of(options, "vllm", free_port).verdict is Verdict.NOT_CHECKED


@pytest.mark.parametrize("rule", FAILURES)
def test_each_known_cause_is_named(
    rule: str, compressed: Path, free_port: int, options: Given, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    here(gpu())
    monkeypatch.setenv("STAND_IN", rule)
    status, text = run(compressed, "vllm", free_port, options)
    assert status == 1
    log = options["cache"] / "handover" / f"vllm-{free_port}" / "engine.log"
    first, *_ = find_causes(log.read_text().split("\n"), {"vllm": "0.26.0"}, 1)
    assert first.rule == rule
    assert first.title in text and first.evidence
    assert "next: " in text and "the whole log: " in text
    if rule == "serve.context":
        assert "smaller --context 16384" in text
    if rule == "serve.unknown":
        assert "nobody has seen this before" in text


def test_failed_smoke_is_a_failed_check(
    compressed: Path, free_port: int, options: Given, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    here(gpu())
    monkeypatch.setenv("STAND_IN", "no-pictures")
    status, text = run(compressed, "vllm", free_port, options)
    assert status == 1
    assert "At most 0 image(s)" in text
    rows = {row.kind: row.verdict for row in receipt_of(options, "vllm", free_port).smoke}
    assert (rows["text"], rows["image"], rows["audio"]) == (Verdict.PASS, Verdict.FAIL, Verdict.PASS)


def test_emulation_is_called_slow(
    compressed: Path, free_port: int, options: Given, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    here(gpu())
    options["smoke"] = False
    monkeypatch.setenv("STAND_IN", "emulated")
    _, text = run(compressed, "vllm", free_port, options)
    assert "experts: EMULATION (emulated), SLOW" in text


def test_death_during_the_smoke_is_told(
    compressed: Path, free_port: int, options: Given, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    here(gpu())
    monkeypatch.setenv("STAND_IN", "dies")
    status, text = run(compressed, "vllm", free_port, options)
    assert status == 1
    assert "died during the smoke requests" in text and "illegal memory access" in text


@pytest.mark.parametrize("mode", ["hang", "deaf"])
def test_a_start_without_end_is_ended(
    mode: str, compressed: Path, free_port: int, options: Given, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    here(gpu())
    monkeypatch.setenv("STAND_IN", mode)
    monkeypatch.setattr(process, "INTERRUPT_S", 0.3)
    options["start_timeout_s"] = 0.5
    begin = time.monotonic()
    status, text = run(compressed, "vllm", free_port, options)
    assert status == 1 and time.monotonic() - begin < 10
    assert "did not become healthy" in text and "--start-timeout" in text


def test_a_key_is_kept_out_of_sight(compressed: Path, free_port: int, options: Given, here: Here) -> None:
    here(gpu())
    options["api_key"] = "hidden-word"
    status, text = run(compressed, "vllm", free_port, options)
    assert status == 0
    folder = options["cache"] / "handover" / f"vllm-{free_port}"
    assert "hidden-word" not in text + (folder / "handover.json").read_text()


def test_a_taken_port_is_told_before_loading(compressed: Path, options: Given, here: Here) -> None:
    import socket

    here(gpu())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(OmniFP4Error, match="cannot listen at 127"):
            run(compressed, "vllm", taken.getsockname()[1], options)


def test_no_gpu_stops_before_anything_runs(compressed: Path, free_port: int, options: Given, here: Here) -> None:
    here()
    with pytest.raises(OmniFP4Error, match="there is no GPU"):
        run(compressed, "vllm", free_port, options)
    assert not (options["cache"] / "handover").exists()


CHILD = """
import sys
from handover_machines import gpu, machine
from omnifp4.handover import artifact, process, serve_with
artifact.this_machine = lambda python: machine(gpu())
process.INTERRUPT_S = process.TERMINATE_S = 0.3
options = {"cache": sys.argv[2], "python": sys.argv[3], "smoke": False}
sys.exit(serve_with(sys.argv[1], "vllm", host="127.0.0.1", port=int(sys.argv[4]), print_only=False, options=options))
"""


@pytest.mark.parametrize(("mode", "number"), [("ok", signal.SIGINT), ("slow-stop", signal.SIGTERM)])
def test_ctrl_c_stops_the_engine(
    mode: str, number: signal.Signals, compressed: Path, free_port: int, options: Given
) -> None:
    command = [
        sys.executable,
        "-c",
        CHILD,
        str(compressed),
        str(options["cache"]),
        str(options["python"]),
        str(free_port),
    ]
    environment = {**os.environ, "STAND_IN": mode, "PYTHONPATH": str(Path(__file__).parent)}
    server = parse_server(f"http://127.0.0.1:{free_port}")
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        for line in child.stderr:
            if "Ctrl-C stops it" in line:
                break
        assert is_healthy(server)
        child.send_signal(number)
        rest = child.stderr.read()
        assert child.wait(20) == 0, rest
    assert not is_healthy(server)


def test_ctrl_c_during_the_start_stops_the_engine_too(
    compressed: Path, free_port: int, options: Given, tmp_path: Path
) -> None:
    command = [
        sys.executable,
        "-c",
        CHILD,
        str(compressed),
        str(options["cache"]),
        str(options["python"]),
        str(free_port),
    ]
    record = tmp_path / "record.json"
    environment = {
        **os.environ,
        "STAND_IN": "hang",
        "STAND_IN_RECORD": str(record),
        "PYTHONPATH": str(Path(__file__).parent),
    }
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        for line in child.stderr:
            if "measuring memory" in line or "capturing" in line or "loading" in line:
                break
        child.send_signal(signal.SIGINT)
        child.stderr.read()
        assert child.wait(20) != 0
    with pytest.raises(ProcessLookupError):
        os.kill(json.loads(record.read_text())["pid"], 0)
