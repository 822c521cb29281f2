"""The hand-over from beginning to end: check, convert if needed, write the command, run it, prove that it answers."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final

from omnifp4.benchmark.server.client import is_healthy, parse_server
from omnifp4.checkpoint.output import write_text
from omnifp4.doctor.machine import ask_nvidia_smi
from omnifp4.errors import OmniFP4Error
from omnifp4.handover import artifact
from omnifp4.handover.causes import find_causes
from omnifp4.handover.command import EngineCommand, build_command
from omnifp4.handover.environments import PINS, EngineEnvironment, engine_folder, find_environment, interpreter
from omnifp4.handover.log_reading import kernels_used, memory_told, plain
from omnifp4.handover.options import Options, cache_folder, check_engine, read_options
from omnifp4.handover.placement import place
from omnifp4.handover.process import EngineProcess, wait_until
from omnifp4.handover.progress import StartProgress
from omnifp4.handover.smoke import send_smoke
from omnifp4.handover.talk import PlainTalk, Talk
from omnifp4.handover.text import failure_text, handover_text, plan_text
from omnifp4.receipt.base import Verdict, this_environment
from omnifp4.receipt.doctor import Ability, Machine
from omnifp4.receipt.handover import HandoverReceipt, KernelUse, SmokeResult

FAILED: Final = 1
WATCH_S: Final = 1.0
RECEIPT_NAME: Final = "handover.json"
LOG_NAME: Final = "engine.log"


@dataclass(frozen=True)
class Prepared:
    """Everything that is known before anything runs.

    Attributes:
        source: as it was given.
        judged: the artifact as it will be served.
        converted_because: empty if it is served as it is.
        reasons: for what stands in the command.
        notes: worth knowing, such as that the engine is not installed.
    """

    engine: str
    source: str
    judged: artifact.Judged
    environment: EngineEnvironment
    command: EngineCommand
    run_folder: Path
    converted_because: str
    reasons: tuple[str, ...]
    notes: tuple[str, ...]


def serve_with(
    model: str,
    engine: str,
    *,
    host: str,
    port: int,
    print_only: bool,
    options: Mapping[str, Any] | None = None,
    talk: Talk | None = None,
) -> int:
    """Serve `model` with vLLM or vLLM-Omni until Ctrl-C.

    Args:
        model: folder or Hub id of an artifact, or of a wide checkpoint.
        engine: ``vllm`` (text out) or ``vllm-omni`` (text and speech out).
        host: address to listen at.
        port: port to listen at.
        print_only: show command and files, and run nothing.
        options: see `Options`; a value of None counts as not given.
        talk: where results and talk go; stdout and stderr if not given.

    Returns:
        Exit status: 0 done; 1 the engine did not start, died, or a smoke request failed.

    Raises:
        OmniFP4Error: anything that can be told before it runs: the artifact, the environment, the options.
    """
    chosen = read_options(dict(options or {}))
    check_engine(engine)
    output = talk or PlainTalk()
    if not 0 < port < 65536:
        raise OmniFP4Error(f"port {port} is not between 1 and 65535")
    prepared = prepare(model, engine, chosen, host=host, port=port, print_only=print_only, output=output)
    if print_only:
        output.show(plan_text(prepared.command, prepared.reasons, prepared.notes))
        return 0
    return _run(prepared, chosen, host, port, output)


def prepare(
    model: str,
    engine: str,
    options: Options,
    *,
    host: str,
    port: int,
    print_only: bool,
    output: Talk,
    machine: Machine | None = None,
) -> Prepared:
    """Check artifact and environment, convert if the engine needs it, and build the command.

    With `print_only` nothing is converted or written: the command names the folder where the copy would be.

    Raises:
        OmniFP4Error: the engine cannot read the artifact, or (unless `print_only`) cannot run here.
    """
    environment, notes = _environment(engine, options, print_only)
    here = machine or artifact.this_machine(environment.python if environment.python_version else None)
    judged = artifact.judge(model, engine, environment, here)
    local = Path(model).expanduser()
    folder = str(local) if local.is_dir() else model
    if because := artifact.needs_conversion(judged):
        copy = artifact.conversion_folder(cache_folder(options), judged.facts)
        folder = str(copy)
        if print_only and not copy.is_dir():
            notes.append(f"the artifact would first be converted: {because}")
            notes.append(f"by hand: omnifp4 convert {model} {copy} --format compressed-tensors")
        else:
            _convert(model, copy, because, output)
            judged = artifact.judge(folder, engine, environment, here)
    if not because or Path(folder).is_dir():
        artifact.require_readable(judged)
        if print_only:
            if judged.row.ability is not Ability.CAN:
                told = "it cannot run" if judged.row.ability is Ability.CANNOT else "it is not known to run"
                notes.append(f"{told} here as it is: {judged.row.reasons[0]}")
        else:
            artifact.require_runnable(judged)
    unread = artifact.unread_notes(judged.facts, environment)
    notes += [reason for reason in unread if not any(reason in note for note in notes)]
    placement = place(judged.facts, here, engine, options)
    run_folder = cache_folder(options) / "handover" / f"{engine}-{port}"
    command, reasons = build_command(
        engine,
        folder,
        judged.facts,
        here,
        placement,
        environment.python,
        environment.versions,
        options,
        host=host,
        port=port,
        run_folder=run_folder,
        name=local.resolve().name if local.is_dir() else model,
        local=local.is_dir() or bool(because),
    )
    if "MoE backend marlin" in " ".join(reasons) or artifact.capability(here).startswith(("7.", "8.", "9.")):
        if problem := artifact.marlin_problem(judged.facts):
            raise OmniFP4Error(f"{model}: {problem}", hint="omnifp4 serve MODEL runs it with this package's own engine")
        if padding := artifact.marlin_padding(judged.facts):
            notes.append(padding)
    if "speech" in command.modalities and (problem := artifact.speech_problem(judged.facts)):
        notes.append(problem)
    if because:
        reasons.insert(0, f"served from a copy in compressed-tensors' form: {because}")
    return Prepared(
        engine=engine,
        source=model,
        judged=judged,
        environment=environment,
        command=command,
        run_folder=run_folder,
        converted_because=because,
        reasons=(*placement.reasons, *reasons),
        notes=tuple(notes),
    )


def _environment(engine: str, options: Options, print_only: bool) -> tuple[EngineEnvironment, list[str]]:
    """The engine's environment; to print a command, one that could be made will do."""
    try:
        return find_environment(engine, options.python), []
    except OmniFP4Error as error:
        if not print_only or options.python is not None:
            raise
        versions = dict(pin.split("==") for pin in PINS[engine])
        made = EngineEnvironment(interpreter(engine_folder(engine)), "", versions, named=False)
        return made, [f"{error}; the command is for vLLM {versions['vllm']}"]


def _convert(model: str, copy: Path, because: str, output: Talk) -> None:
    """Make the copy in compressed-tensors' form, unless it is there from an earlier run."""
    from omnifp4 import api
    from omnifp4.checkpoint.hub import fetch_model, is_hub_id
    from omnifp4.checkpoint.staging import partial_folder

    if copy.is_dir():
        output.say(f"converted copy of an earlier run: {copy}")
        return
    output.say(f"converting to compressed-tensors: {because}")
    source = fetch_model(model) if is_hub_id(model) else Path(model).expanduser()
    copy.parent.mkdir(parents=True, exist_ok=True)
    with output.progress("convert") as progress:
        api.convert(source, copy, format="compressed-tensors", resume=partial_folder(copy).exists(), progress=progress)


def _run(prepared: Prepared, options: Options, host: str, port: int, output: Talk) -> int:
    _require_free(host, port)
    command = prepared.command
    prepared.run_folder.mkdir(parents=True, exist_ok=True)
    for path, content in command.files.items():
        write_text(path, content)
    log = prepared.run_folder / LOG_NAME
    (prepared.run_folder / RECEIPT_NAME).unlink(missing_ok=True)
    for note in (*prepared.reasons, *prepared.notes):
        output.say(note)
    output.say(f"running: {command.shown()}")
    output.say(f"its log: {log}")
    server = parse_server(command.url, key=options.api_key)
    progress = StartProgress(prepared.engine, options.start_timeout_s)
    begin = time.monotonic()
    with (
        _stopping_on_terminate(),
        EngineProcess(command.arguments, {**command.environment, **command.secrets}, log) as process,
    ):
        try:
            healthy = wait_until(lambda: is_healthy(server), process, options.start_timeout_s, progress.update)
        finally:
            progress.end()
        start_s = time.monotonic() - begin
        if not healthy:
            return _failed(prepared, process, f"did not become healthy in {start_s:.0f} s", output)
        smoke = (
            send_smoke(server, command.model_name, command.modalities, options.seed, output.say)
            if options.smoke
            else ()
        )
        receipt = _receipt(prepared, process, start_s, smoke)
        write_text(prepared.run_folder / RECEIPT_NAME, receipt.model_dump_json(indent=2) + "\n")
        output.show(handover_text(receipt))
        if process.status() is not None:
            return _failed(prepared, process, "died during the smoke requests", output)
        verdict = FAILED if receipt.verdict is Verdict.FAIL else 0
        if options.stop_after_smoke:
            return verdict
        try:
            # Inside, because who reads this line may stop the engine before it is written whole.
            output.say(f"serving at {command.url}/v1 as {command.model_name!r}; Ctrl-C stops it")
            while process.status() is None:
                time.sleep(WATCH_S)
        except KeyboardInterrupt:
            output.say("stopping the engine")
            return verdict
        return _failed(prepared, process, "died while it served", output)


def _require_free(host: str, port: int) -> None:
    """Raises OmniFP4Error if something listens there: the engine would find out after minutes of loading."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise OmniFP4Error(
                f"cannot listen at {host}:{port}: {error.strerror or error}", hint="choose another --port"
            ) from error


@contextmanager
def _stopping_on_terminate() -> Iterator[None]:
    """A terminate signal counts as Ctrl-C inside, so that the engine is stopped with us."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _failed(prepared: Prepared, process: EngineProcess, what: str, output: Talk) -> int:
    status = process.status()
    causes = find_causes(process.all_lines(), prepared.environment.versions, status)
    if status is None:
        headline = f"{prepared.engine} {what} and was stopped; --start-timeout gives it more time"
    else:
        headline = f"{prepared.engine} ended with status {status}: it {what}"
    output.show(failure_text(headline, causes, process.log))
    return FAILED


def _receipt(
    prepared: Prepared, process: EngineProcess, start_s: float, smoke: tuple[SmokeResult, ...]
) -> HandoverReceipt:
    lines = [plain(line) for line in process.all_lines()]
    kernels = kernels_used(lines)
    gpus = ask_nvidia_smi()
    used = sum(gpu.memory_bytes - gpu.free_bytes for gpu in gpus if gpu.free_bytes is not None)
    return HandoverReceipt(
        model=prepared.source,
        served=prepared.judged.folder,
        converted_because=prepared.converted_because,
        engine=prepared.engine,
        versions=dict(prepared.environment.versions),
        python=prepared.environment.python_version,
        command=prepared.command.shown(),
        files={path.name: content for path, content in prepared.command.files.items()},
        reasons=prepared.reasons,
        url=prepared.command.url,
        start_s=start_s,
        kernels=kernels,
        memory=memory_told(lines),
        gpu_bytes=used,
        smoke=smoke,
        verdict=_verdict(smoke, kernels),
        environment=this_environment(),
    )


def _verdict(smoke: tuple[SmokeResult, ...], kernels: tuple[KernelUse, ...]) -> Verdict:
    """Fail if a request failed; not checked if none was sent or no kernel was named."""
    if any(result.verdict is Verdict.FAIL for result in smoke):
        return Verdict.FAIL
    passed = any(result.verdict is Verdict.PASS for result in smoke)
    return Verdict.PASS if passed and kernels else Verdict.NOT_CHECKED
