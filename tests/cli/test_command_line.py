"""The command line's manners: streams, JSON, exit statuses, interrupts."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import PROGRAM, PROGRESS, refused, run

from omnifp4.receipt.plan import PlanReceipt
from omnifp4.receipt.quantization import QuantizationReceipt
from omnifp4.receipt.verification import VerificationReceipt
from small_checkpoints import folder_bytes

VERBS = ("demo", "plan", "quantize", "verify", "convert", "repair")

HELP_AND_TELL = """
import resource, sys
from omnifp4.cli.main import run
sys.argv = ["omnifp4", *sys.argv[1:]]
try:
    run()
finally:
    used = resource.getrusage(resource.RUSAGE_SELF)
    heavy = {"torch", "numba", "transformers", "huggingface_hub", "pandas"} & set(sys.modules)
    sys.stderr.write(f"{used.ru_utime + used.ru_stime} {','.join(heavy)}")
"""

SLOW = """
import sys, time
from omnifp4.quantization.work import Worker
plain = Worker.run
def slow(self, unit):
    sys.stderr.write("unit\\n")
    sys.stderr.flush()
    time.sleep(0.05)
    return plain(self, unit)
Worker.run = slow
from omnifp4.cli.main import run
run()
"""


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_is_quick_and_imports_nothing_heavy(verb: str) -> None:
    arguments = [verb, "--help"] if verb else ["--help"]
    done = subprocess.run([sys.executable, "-c", HELP_AND_TELL, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Usage: ")
    seconds, _, heavy = done.stderr.partition(" ")
    assert heavy == ""
    assert float(seconds) < 1.5
    for word in VERBS if not verb else ():
        assert re.search(rf"^  {word} ", done.stdout, re.MULTILINE)


def test_help_names_the_choices() -> None:
    text = " ".join(run("quantize", "--help").stdout.split())
    for word in (
        "nvfp4-mlp", "nvfp4-thinker-talker", "compressed-tensors", "fake-quant", "four-over-six", "--resume", "--component",
    ):  # fmt: skip
        assert word in text


def test_the_version() -> None:
    done = run("--version")
    assert re.fullmatch(r"omnifp4 \d+\.\d+\S*\n", done.stdout)


@pytest.mark.parametrize(
    "arguments",
    [
        [], ["nothing"], ["plan"], ["plan", "x", "--nope"], ["quantize", "x"], ["verify"],
        ["quantize", "x", "y", "--threads", "0"], ["quantize", "x", "y", "--threads", "many"], ["plan", "--json"],
    ],
)  # fmt: skip
def test_wrong_usage_is_exit_status_2(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "Usage: " in done.stdout + done.stderr


def test_json_is_one_document_and_a_receipt(tiny_omni: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    planned = run("plan", tiny_omni, "--json")
    assert planned.stderr == ""
    plan = PlanReceipt.model_validate_json(planned.stdout)
    assert json.loads(planned.stdout) == plan.model_dump(mode="json")
    made = run("quantize", tiny_omni, out, "--json")
    receipt = QuantizationReceipt.model_validate_json(made.stdout)
    assert receipt == QuantizationReceipt.model_validate_json((out / "omnifp4.json").read_text())
    assert "next: omnifp4 verify " in made.stderr
    proved = run("verify", out, "--against", tiny_omni, "--json")
    proof = VerificationReceipt.model_validate_json(proved.stdout)
    assert (proved.returncode, proof.verdict) == (0, "pass")
    assert plan.weight_bytes_after == receipt.weight_bytes == proof.weight_bytes


def test_people_get_tables_on_stdout_and_hints_on_stderr(tiny_omni: Path, tmp_path: Path) -> None:
    planned = run("plan", tiny_omni)
    assert planned.stderr == ""
    for word in ("thinker.experts", "talker.shared_experts", "36.0% FP4", "smaller", "picks the experts", "free disk"):
        assert word in planned.stdout
    assert "…" not in planned.stdout  # Nothing is cut off at 80 columns.
    made = run("quantize", tiny_omni, tmp_path / "out's")
    assert "1.34x smaller" in made.stdout
    command = made.stderr.partition("next: omnifp4 ")[2].strip()
    again = subprocess.run(f"{sys.executable} -m omnifp4 {command}", shell=True, capture_output=True, text=True)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "PASS" in again.stdout


def test_fake_quant_says_that_nothing_shrinks(tiny_omni: Path, tmp_path: Path) -> None:
    assert "nothing shrinks" in run("plan", tiny_omni, "--format", "fake-quant").stdout
    made = run("quantize", tiny_omni, tmp_path / "out", "--format", "fake-quant")
    assert made.returncode == 0
    assert "nothing shrinks" in made.stdout
    assert "smaller" not in made.stdout


def test_a_folder_whose_name_is_markup_or_no_text(tiny_omni: Path, tmp_path: Path) -> None:
    for name in (b"[bold]red[", b"[", b"caf\xe9"):
        link = tmp_path / os.fsdecode(name)
        link.symlink_to(tiny_omni)
        done = run("plan", link, text=False)
        assert done.returncode == 0, done.stderr
        assert name.replace(b"\xe9", "\ufffd".encode()) in done.stdout
        told = json.loads(run("plan", link, "--json").stdout)
        assert told["model"].endswith(name.decode("utf-8", "replace"))


def test_output_that_is_ascii_only(tiny_omni: Path) -> None:
    done = run("plan", tiny_omni, environment={"PYTHONIOENCODING": "ascii", "LC_ALL": "C"})
    assert done.returncode == 0
    assert done.stdout.isascii()


@pytest.mark.parametrize("arguments", [["--json"], []])
def test_a_reader_that_goes_away(tiny_omni: Path, arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = run("plan", tiny_omni, *arguments, capture_output=False, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert done.returncode == 1
    assert done.stderr == ""


@pytest.mark.parametrize("arguments", [["plan", "--json"], ["plan"], ["--help"]])
def test_a_full_disk_behind_stdout(tiny_omni: Path, arguments: list[str]) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    verb, *rest = arguments
    with Path("/dev/full").open("w") as full:
        done = run(
            verb,
            *([tiny_omni] if verb == "plan" else []),
            *rest,
            capture_output=False,
            stdout=full,
            stderr=subprocess.PIPE,
        )
    assert done.returncode == 2
    assert done.stderr == "error: output: No space left on device\n"


def test_closed_streams(tiny_omni: Path) -> None:
    for redirect, status in (("plan {} >&-", 0), ("plan {} --json >&-", 0), ("plan nowhere 2>&-", 2)):
        command = f"{sys.executable} -m omnifp4 {redirect.format(tiny_omni)}"
        done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stderr
        assert done.stderr == ""


@pytest.fixture(scope="module")
def whole(tiny_omni: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole") / "out"
    assert run("quantize", tiny_omni, out).returncode == 0
    return comparable(out)


def comparable(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in folder_bytes(folder).items() if name not in {"omnifp4.json", "README.md"}}


@pytest.mark.parametrize(
    ("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_an_interrupted_run_can_be_resumed(
    tiny_omni: Path, tmp_path: Path, whole: dict[str, bytes], sent: signal.Signals, status: int
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", SLOW, "quantize", str(tiny_omni), str(out), "--threads", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        units = 0
        while units < 20:
            line = process.stderr.readline()
            assert line == "unit\n" or PROGRESS.match(line), line
            units += line == "unit\n"
        process.send_signal(sent)
        told = process.stderr.read()
        assert process.wait(30) == status
        assert process.stdout is not None
        assert process.stdout.read() == ""
    assert "Traceback" not in told
    if sent == signal.SIGINT:
        assert told.splitlines()[-1] == "interrupted; a run with --resume goes on where this one stopped"
    assert not out.exists()
    refused(run("quantize", tiny_omni, out), "out.partial: left by an unfinished run", "--resume")
    done = run("quantize", tiny_omni, out, "--resume", "--json")
    assert json.loads(done.stdout)["resumed_units"] >= 15
    assert comparable(out) == whole


def test_a_limit_on_file_size_is_a_full_disk(tiny_omni: Path, tmp_path: Path, whole: dict[str, bytes]) -> None:
    command = " ".join(["ulimit -f 4000;", *PROGRAM, "quantize", str(tiny_omni), str(tmp_path / "out")])
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    refused(done, "out.partial: the disk is full", "--resume")
    assert not (tmp_path / "out").exists()
    assert run("quantize", tiny_omni, tmp_path / "out", "--resume").returncode == 0
    assert comparable(tmp_path / "out") == whole
