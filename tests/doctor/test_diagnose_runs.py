"""How scripts are run and watched: healthy ones, status, stalls, time, memory; and no false alarms."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from omnifp4.doctor import diagnose, run_diagnose
from omnifp4.errors import OmniFP4Error
from omnifp4.receipt.diagnosis import DiagnosisReceipt, Outcome

pytestmark = pytest.mark.xdist_group("doctor")

Diagnosed = Callable[[str], DiagnosisReceipt]


def test_healthy_script_raises_no_alarm(diagnosed: Diagnosed) -> None:
    receipt = diagnosed("healthy")
    assert (receipt.outcome, receipt.healthy) == (Outcome.ENDED, True), receipt
    assert receipt.explanations == ()
    assert [record.roles for record in receipt.generates] == [("user", "assistant")] * 2
    assert [record.result for record in receipt.generates] == ["tuple", "Tensor"]
    assert [(row.calls, row.failed) for row in receipt.calls] == [(3, 0)]
    assert receipt.cat.empty == 0 < receipt.cat.calls
    assert [load.result for load in receipt.loads] == ["Qwen3OmniMoeForConditionalGeneration", "Qwen3OmniMoeProcessor"]


def test_structure_report(diagnosed: Diagnosed) -> None:
    structure = diagnosed("healthy").structure
    assert structure is not None
    assert structure.modules > 300
    assert structure.parameters > 5_000_000
    # The five kinds that the second seed lists.
    assert {name.removeprefix("Qwen3OmniMoe") for name in structure.attention} >= {
        "AudioAttention",
        "VisionAttention",
        "ThinkerTextAttention",
        "TalkerCodePredictorAttention",
        "Code2WavAttention",
    }
    assert structure.dtypes["bfloat16"] > 10_000_000
    assert (structure.quantized_parameters, structure.packed) == (0, False)


def test_plain_python_is_left_alone(diagnosed: Diagnosed) -> None:
    receipt = diagnosed("plain-python")
    assert receipt.healthy and receipt.explanations == ()
    assert receipt.output_tail == ("size mismatch, out of memory: words only",)


def test_unexplained_failures_are_told_as_they_are(diagnosed: Diagnosed) -> None:
    status = diagnosed("exit-3")
    assert (status.exit_status, status.healthy) == (3, False)
    assert [item.rule for item in status.explanations] == ["exit.status"]
    error = diagnosed("own-error")
    assert error.error == "ZeroDivisionError: division by zero"
    assert [item.rule for item in error.explanations] == ["error.unexplained"]
    assert "in f: return 1 / 0" in error.explanations[0].evidence[0]


def test_host_memory(diagnosed: Diagnosed) -> None:
    assert [item.rule for item in diagnosed("host-memory").explanations] == ["memory.host"]
    killed = diagnosed("killed")
    assert (killed.outcome, killed.exit_status) == (Outcome.KILLED, -9)
    assert [item.rule for item in killed.explanations] == ["memory.host"]


def test_idle_script_is_ended(diagnosed: Diagnosed) -> None:
    receipt = diagnosed("waiting")
    assert receipt.outcome is Outcome.STALLED
    assert [item.rule for item in receipt.explanations] == ["stall"]
    assert "another thread" in receipt.explanations[0].cause
    assert receipt.output_tail == ("one",)


def test_silent_computing_is_no_stall(diagnosed: Diagnosed) -> None:
    assert diagnosed("computing").healthy


def test_missing_module(diagnosed: Diagnosed) -> None:
    receipt = diagnosed("missing-module")
    assert [item.rule for item in receipt.explanations] == ["environment.module"]
    assert receipt.explanations[0].fix == "pip install qwen_omni_utils_of_another_name"


def test_timeout_ends_the_script_and_what_it_started(tmp_path: Path) -> None:
    script = tmp_path / "long.py"
    mark = tmp_path / "mark"
    (tmp_path / "later.py").write_text(f"import time\ntime.sleep(4)\nopen({str(mark)!r}, 'w')\n")
    script.write_text(
        f"import subprocess, sys, time\nsubprocess.Popen([sys.executable, {str(tmp_path / 'later.py')!r}])\n"
        "while True: print('tick', flush=True); time.sleep(0.1)\n"
    )
    told: list[str] = []
    receipt = run_diagnose(script, timeout=1.5, on_output=told.append)
    assert receipt.outcome is Outcome.TIMED_OUT
    assert [item.rule for item in receipt.explanations] == ["run.timeout"]
    assert told and set(told) == {"tick"}
    assert receipt.seconds < 4
    assert not mark.exists()


def test_script_runs_as_with_python(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("value = 7\n")
    script = tmp_path / "main.py"
    script.write_text(
        "import sys, json, beside, __main__\n"
        "print(json.dumps([sys.argv, sys.path[0], __name__, __file__, beside.value, 'omnifp4' in sys.modules,"
        " __main__.__file__]))\n"
    )
    ours = json.loads(diagnose(script, ["x", "--y"]).output_tail[-1])
    done = subprocess.run([sys.executable, str(script), "x", "--y"], capture_output=True, text=True, check=True)
    assert ours == json.loads(done.stdout)
    assert ours[5] is False


def test_endless_kinds_of_failures_stay_small(tmp_path: Path) -> None:
    from omnifp4.doctor.watch.log import KINDS, OTHERS, Log

    log = Log(str(tmp_path / "events"))
    for number in range(1000):
        error = ValueError(f"sample {number}")
        log.count_call("M", error)
        log.threw("call", "M", error)
    log.beat()
    assert log.calls["M"][:2] == [1000, 1000]
    assert log.calls["M"][2][OTHERS] == 1000 - KINDS
    assert len((tmp_path / "events").read_text().splitlines()) == KINDS + 1


def test_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(OmniFP4Error, match="no such script"):
        diagnose(tmp_path / "none.py")
    script = tmp_path / "empty.py"
    script.write_text("")
    with pytest.raises(OmniFP4Error, match="timeout is 0"):
        diagnose(script, timeout=0)
    assert diagnose(script).healthy
