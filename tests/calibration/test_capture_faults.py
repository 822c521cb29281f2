"""Samples that fail are counted and told, too many end the run with nothing written, and a killed run goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from omnifp4.calibration.failures import CalibrationFailed
from omnifp4.errors import OmniFP4Error
from omnifp4.receipt.calibration import Cause
from small_checkpoints import Tensor, file_bytes, read_tensors

torch: Any = pytest.importorskip("torch")
transformers: Any = pytest.importorskip("transformers")


def nothing_left(out: Path) -> None:
    assert not out.exists()
    assert not out.with_name(f"{out.name}.partial").exists()


@pytest.mark.parametrize("max_failed", [0.05, 1.0])
def test_a_forward_that_takes_no_input_ids(
    calibrate: Callable[..., Any], tiny_omni: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_failed: float
) -> None:
    """A quantizer's wrapper had replaced the forward: all samples failed with this error, and the exit status was 0."""
    thinker = transformers.Qwen3OmniMoeThinkerForConditionalGeneration
    monkeypatch.setattr(thinker, "forward", torch.nn.modules.module._forward_unimplemented)
    with pytest.raises(CalibrationFailed, match="wrong forward") as error:
        calibrate(tiny_omni, tmp_path / "out", max_failed=max_failed)
    told = str(error.value)
    assert "_forward_unimplemented() got an unexpected keyword argument 'input_ids'" in told
    assert "nothing whole is written" in told
    assert told.startswith("4 of 4 samples failed" if max_failed == 1 else "1 of 4 samples failed")
    assert "\n" not in told
    nothing_left(tmp_path / "out")


def _with_bad_media(write_lines: Callable[..., Path], tmp_path: Path, bad: int, good: int) -> Path:
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    lines: list[Any] = [{"messages": f"Say {number}", "answer": "Yes"} for number in range(good)]
    for number in range(bad):
        content = [{"type": "image", "image": "bad.png"}, {"type": "text", "text": "What is it?"}]
        lines.append({"id": f"bad {number}", "messages": [{"role": "user", "content": content}], "answer": "a"})
    return write_lines(*lines)


def test_some_failures_are_told_and_more_abort(
    calibrate: Callable[..., Any], tiny_omni: Path, tmp_path: Path, write_lines: Callable[..., Path]
) -> None:
    data = _with_bad_media(write_lines, tmp_path, bad=2, good=6)
    with pytest.raises(
        CalibrationFailed, match=r"2 of 8 samples failed \(missing or damaged media: 2\), and at most 24%"
    ):
        calibrate(tiny_omni, tmp_path / "out", data=data, samples=None, max_failed=0.24)
    nothing_left(tmp_path / "out")
    receipt = calibrate(tiny_omni, tmp_path / "out", data=data, samples=None, max_failed=0.25)
    assert receipt.samples == 8
    assert [(one.sample, one.cause, one.layer) for one in receipt.failures] == [
        ("bad 0", Cause.MEDIA, None), ("bad 1", Cause.MEDIA, None),
    ]  # fmt: skip
    assert "bad.png" in receipt.failures[0].error
    from omnifp4.report.calibration import calibration_text

    shown = _shown(calibration_text(receipt, "out"))
    assert "2 of 8 samples failed; the first: 'bad 0': missing or damaged media: " in shown


def _shown(renderable: Any) -> str:
    from rich.console import Console

    console = Console(width=300)
    with console.capture() as shown:
        console.print(renderable)
    return shown.get()


def test_a_wrong_prompt(
    calibrate: Callable[..., Any], tiny_omni: Path, tmp_path: Path, write_lines: Callable[..., Path]
) -> None:
    broken = Path(shutil.copytree(tiny_omni, tmp_path / "broken"))
    (broken / "chat_template.jinja").write_text("{% for message in messages %}lost{% endfor %}")
    data = write_lines({"messages": "Hello", "answer": "Hi"})
    with pytest.raises(CalibrationFailed, match=r"1 of 1 samples failed \(wrong prompt: 1\).* template"):
        calibrate(broken, tmp_path / "out", data=data, samples=None)
    nothing_left(tmp_path / "out")


def test_activations_that_are_not_finite(
    calibrate: Callable[..., Any], tiny_omni: Path, tmp_path: Path, write_lines: Callable[..., Path]
) -> None:
    """One layer overflows on pictures only: layer and sample are named, and the sample is in no later layer's sums."""
    tensors = read_tensors(tiny_omni)
    torn = Path(shutil.copytree(tiny_omni, tmp_path / "torn"))
    name = "thinker.model.layers.2.mlp.experts.0.down_proj.weight"
    bits = tensors[name].bits.copy()
    bits[:] = 0x7F80
    for expert in range(8):
        tensors[name.replace(".0.down", f".{expert}.down")] = Tensor("BF16", bits)
    (torn / "model.safetensors").write_bytes(file_bytes(tensors))
    data = write_lines({"id": "first", "messages": "Hello", "answer": "Hi"}, {"messages": "Bye", "answer": "So long"})
    with pytest.raises(
        CalibrationFailed, match=r"activations that are not finite.*the first was 'first': layer 2: "
    ) as error:
        calibrate(torn, tmp_path / "out", data=data, samples=None)
    assert "what leaves the layer is not finite, first at token 0; weight " in str(error.value)
    assert f"weight {name!r} holds NaN or infinite values" in str(error.value)
    assert "--dtype float32" in str(error.value)


def test_one_bad_sample_is_left_behind(
    calibrate: Callable[..., Any], tiny_omni: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is in the sums of the layers before, and not in those behind."""
    from omnifp4.calibration import running
    from omnifp4.calibration.statistics import open_statistics

    check = running.check_finite
    calls: list[str] = []

    def fails_once(inputs: Any, after: Any, where: str) -> None:
        calls.append(where)
        if where == "layer 1" and calls.count(where) == 2:
            raise running.NotFinite("layer 1: made up")
        check(inputs, after, where)

    monkeypatch.setattr(running, "check_finite", fails_once)
    receipt = calibrate(tiny_omni, tmp_path / "out", max_failed=0.25)
    assert [(one.layer, one.cause) for one in receipt.failures] == [(1, Cause.NUMBERS)]
    with open_statistics(tmp_path / "out") as statistics:
        tokens = [statistics.of(f"thinker.model.layers.{layer}.self_attn.q_proj.weight").tokens for layer in range(4)]
    assert tokens[0] > tokens[1] == tokens[2] == tokens[3] == sum(receipt.tokens.values())


def test_a_killed_run_goes_on(
    calibrate: Callable[..., Any], tiny_omni: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from omnifp4.calibration import capture

    whole = calibrate(tiny_omni, tmp_path / "whole")
    write, out = capture.write_part, tmp_path / "out"

    def dies(staging: Any, unit: str, *values: Any) -> None:
        if unit == "layer 2":
            raise KeyboardInterrupt
        write(staging, unit, *values)

    with monkeypatch.context() as patched:
        patched.setattr(capture, "write_part", dies)
        with pytest.raises(KeyboardInterrupt):
            calibrate(tiny_omni, out)
    assert not out.exists()
    with pytest.raises(OmniFP4Error, match="left by an unfinished run"):
        calibrate(tiny_omni, out)
    with pytest.raises(OmniFP4Error, match="begun as another job, with other data"):
        calibrate(tiny_omni, out, samples=3, resume=True)
    # A part that was damaged meanwhile does not become a file.
    part = out.with_name("out.partial") / "layer-0.bin"
    kept = part.read_bytes()
    part.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    saved = Path(shutil.copytree(part.parent, tmp_path / "saved"))
    with pytest.raises(OmniFP4Error, match="is not what was written"):
        calibrate(tiny_omni, out, resume=True)
    assert not out.exists()
    shutil.rmtree(part.parent)
    shutil.copytree(saved, part.parent)
    part.write_bytes(kept)
    receipt = calibrate(tiny_omni, out, resume=True)
    assert receipt.resumed_layers == 2
    assert receipt.tensors == whole.tensors
    assert {"vision_tower", "audio_tower", "thinker.head"} <= set(receipt.components)
    nothing_left(out.with_name("out.partial"))
    from omnifp4.calibration.statistics import open_statistics

    with open_statistics(out) as one, open_statistics(tmp_path / "whole") as other:
        assert one.names() == other.names()


def test_a_journal_that_lost_its_end_costs_work_and_no_layer(
    calibrate: Callable[..., Any], tiny_omni: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a loss of power: the states know of layers that the journal of units does not."""
    from omnifp4.calibration import capture

    whole = calibrate(tiny_omni, tmp_path / "whole")
    out = tmp_path / "out"
    partial = out.with_name("out.partial")

    def dies(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(capture, "assemble", dies)
        with pytest.raises(KeyboardInterrupt):
            calibrate(tiny_omni, out)
    journal = partial / ".omnifp4-journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    kept = next(number for number, line in enumerate(lines) if b'"unit":"layer 1"' in line)
    journal.write_bytes(b"".join(lines[:kept]) + lines[kept][:20])
    saved = Path(shutil.copytree(partial, tmp_path / "saved"))
    assert calibrate(tiny_omni, out, resume=True).tensors == whole.tensors
    for change, told in (
        (lambda part: part.unlink(), r"layer-0\.bin: cannot be read: No such file .*remove .*out\.partial and start"),
        (lambda part: part.write_bytes(part.read_bytes()[:50]), r"layer-0\.bin: tensor .* is not what was written"),
    ):
        out.unlink(missing_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(saved, partial)
        change(partial / "layer-0.bin")
        with monkeypatch.context() as patched:
            patched.setattr(capture, "run_layers", dies)
            with pytest.raises(OmniFP4Error, match=told):
                calibrate(tiny_omni, out, resume=True)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"max_failed": 1.5}, "--max-failed is 1.5"),
        ({"least_tokens": 0}, "--least-tokens is 0"),
        ({"all_expert_tokens": -1}, "--all-expert-tokens is -1"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"device": "abacus"}, "device is 'abacus'"),
        ({"samples": 0}, "--samples is 0"),
        ({"samples": 10_000}, "holds 188 conversations, and 10000 are asked for"),
        ({"data": "missing.jsonl"}, "cannot be read as JSONL"),
    ],
)
def test_refusals(calibrate: Callable[..., Any], tiny_omni: Path, tmp_path: Path, options: Any, told: str) -> None:
    with pytest.raises(OmniFP4Error, match=told):
        calibrate(tiny_omni, tmp_path / "out", **options)
    nothing_left(tmp_path / "out")


def test_more_refusals(
    calibrate: Callable[..., Any],
    tiny_omni: Path,
    tiny_artifact: Path,
    tmp_path: Path,
    write_lines: Callable[..., Path],
) -> None:
    out = tmp_path / "out"
    with pytest.raises(OmniFP4Error, match="holds no samples"):
        calibrate(tiny_omni, out, data=write_lines(name="empty.jsonl"))
    with pytest.raises(OmniFP4Error, match="already quantized"):
        calibrate(tiny_artifact, out)
    data = write_lines({"messages": "Hello", "answer": "Hi"})
    with pytest.raises(OmniFP4Error, match="--speech was asked for: no conversation of the set has an answer"):
        calibrate(tiny_omni, out, data=data, samples=None, speech=True)
    bert = Path(shutil.copytree(tiny_omni, tmp_path / "bert"))
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps(config | {"model_type": "qwen2_5_omni"}))
    with pytest.raises(OmniFP4Error):
        calibrate(bert, out)
    nothing_left(out)
    out.write_text("mine")
    with pytest.raises(OmniFP4Error, match="exists already"):
        calibrate(tiny_omni, out)
    assert out.read_text() == "mine"
