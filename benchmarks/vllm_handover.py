"""An artifact of the full shape handed over to vLLM and vLLM-Omni on a GPU, proven and loaded with requests.

    python benchmarks/vllm_handover.py FOLDER --pack PACK      # PACK: vllm.tar.xz (or its parts) and cucache.tar.xz
    python benchmarks/vllm_handover.py FOLDER --python ENVIRONMENT/bin/python

Makes an NVFP4 artifact in compressed-tensors' form with random weights and a tokenizer of the full vocabulary in FOLDER
(a memory file system is best; 27.6 GB): with `--quantize` by `omnifp4 quantize` from a random BF16 checkpoint (70.5 GB
more until it is done), otherwise drawn as it lies, laid out to the byte as `omnifp4 quantize` lays it out. Then, for each
variant: `omnifp4 serve ARTIFACT --engine …`, its smoke requests, and `omnifp4 bench --server`, one client and 32.

Variants: text (plain vLLM, the thinker's decoder alone), full (plain vLLM with towers), omni (vLLM-Omni, three stages);
none makes the artifact only. Speech in vLLM-Omni 0.26 needs `--layers` of at least 25: it reads layer 24 by number.
Prints a line a step and one JSON line. Exit status 1 if a variant fails; the others run all the same.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from omnifp4.benchmark.headers import imagine, shape_config
from omnifp4.checkpoint.output import OutputWriter, write_text
from omnifp4.quantization.decisions import CopyUnit, Decision, Job, OutputFormat, stored_tensors
from omnifp4.quantization.package import artifact_config, write_config_and_index
from omnifp4.quantization.plan import plan_job
from omnifp4.tiny import weights
from omnifp4.tiny.checkpoint import TINY_FILES, asset_bytes

SHAPE = "qwen3-omni-30b-a3b"
CODE_RMS = 3.3
"""Of uniform E2M1 codes under block scales of 0.5 to 1.875."""
LEAST_SCALE, SCALES = 0x30, 16
FILL_BYTES = 1 << 24
ROLES = ("system", "user", "assistant")
"""Words whose ids the config names; vLLM-Omni finds the turns of a conversation by them."""
LEAST_SECONDS = 100.0
"""A variant is not begun with less than this left."""
STOP_S = 90.0
FIRST_SPECIAL = 151_643
"""Of the released vocabulary; the bundled tokenizer has the same special tokens in the same order, further down."""
VARIANTS = {"text": ("vllm", ("--language-model-only",)), "full": ("vllm", ()), "omni": ("vllm-omni", ())}


def random_bytes(random: np.random.Generator, count: int) -> npt.NDArray[np.uint8]:
    words = random.integers(0, 2**64 - 1, size=-(-count // 8), dtype=np.uint64, endpoint=True)
    return words.view(np.uint8)[:count]


def write_linear(writer: OutputWriter, decision: Decision) -> None:
    """Codes, block scales and the tensor scale of one linear, with the spread that its role has in a trained model."""
    codes, scales, scale = stored_tensors(decision.tensor, decision.scheme, OutputFormat.COMPRESSED_TENSORS)
    random = weights.stream(0, decision.spec.name)
    for begin in range(0, size := int(np.prod(codes.shape)), FILL_BYTES):
        writer.write(codes.name, random_bytes(random, min(FILL_BYTES, size - begin)), begin)
    drawn = random_bytes(random, int(np.prod(scales.shape)))
    writer.write(scales.name, drawn % SCALES + LEAST_SCALE)
    std = weights.draw_for(decision.spec.name, decision.spec.shape, True).std
    # A power of two, as the package's own sweep writes it; this dialect stores the reciprocal.
    writer.write(scale.name, np.array([2.0 ** -round(np.log2(std / CODE_RMS))], np.float32))


def write_wide(writer: OutputWriter, unit: CopyUnit, linear: frozenset[str]) -> None:
    """BF16 tensors as the package's random checkpoints have them."""
    for entry in unit.entries:
        draw = weights.draw_for(entry.name, entry.shape, entry.name in linear)
        row_bytes = entry.nbytes // entry.shape[0]
        step = max(1, FILL_BYTES // row_bytes)
        for part, first in enumerate(range(0, entry.shape[0], step)):
            rows = np.empty((min(step, entry.shape[0] - first), *entry.shape[1:]), np.uint16)
            weights.fill(rows, draw, 0, entry.name, part)
            writer.write(entry.name, rows, first * row_bytes)


def write_tokenizer(folder: Path, shape: str) -> None:
    """Processor and tokenizer files; in the full shape, words fill the vocabulary up to the special tokens' own ids."""
    for name in TINY_FILES:
        (folder / name).write_bytes(asset_bytes(name))
    if shape != SHAPE:
        return
    vocabulary = json.loads(asset_bytes("vocab.json"))
    vocabulary |= {f"Ġw{number}": number for number in range(len(vocabulary), FIRST_SPECIAL)}
    words = {number: word for word, number in vocabulary.items()}
    released = shape_config(shape, None)
    for role in ROLES:
        number, wanted = vocabulary[role], released[f"{role}_token_id"]
        words[number], words[wanted] = words[wanted], role
        vocabulary |= {words[number]: number, role: wanted}
    config = json.loads(asset_bytes("tokenizer_config.json"))
    added = config["added_tokens_decoder"]
    moved = FIRST_SPECIAL - min(map(int, added))
    config["added_tokens_decoder"] = {str(int(number) + moved): token for number, token in added.items()}
    write_text(folder / "vocab.json", json.dumps(vocabulary, ensure_ascii=False))
    write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2))
    generation = json.loads(asset_bytes("generation_config.json"))
    write_text(
        folder / "generation_config.json", json.dumps({name: number + moved for name, number in generation.items()})
    )


def plan_artifact(shape: str, layers: int | None) -> Job:
    config = shape_config(shape, layers)
    return plan_job(imagine(shape, config, packed=False).checkpoint, output_format=OutputFormat.COMPRESSED_TENSORS)


def draw_artifact(folder: Path, shape: str, layers: int | None, workers: int) -> None:
    """An artifact whose codes and scales are drawn."""
    job = plan_artifact(shape, layers)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    linear = frozenset(decision.spec.name for decision in job.decisions if decision.spec.is_linear)
    with OutputWriter(partial, job.output) as writer, ThreadPoolExecutor(workers) as pool:
        wide = [pool.submit(write_wide, writer, unit, linear) for unit in job.units if isinstance(unit, CopyUnit)]
        coded = [pool.submit(write_linear, writer, decision) for decision in job.quantized]
        for future in (*wide, *coded):
            future.result()
    write_tokenizer(partial, shape)
    write_config_and_index(partial, artifact_config(job), job)
    partial.rename(folder)


def quantize_artifact(folder: Path, shape: str, layers: int | None) -> None:
    """An artifact that `omnifp4 quantize` makes of random BF16 weights, which are removed again."""
    source = folder.with_name("source")
    shutil.rmtree(source, ignore_errors=True)
    generate = [sys.executable, "-m", "omnifp4.tiny", str(source)]
    generate += ["--real", shape] if shape == SHAPE else []
    generate += ["--layers", str(layers)] if layers else []
    command = [sys.executable, "-m", "omnifp4", "quantize", str(source), str(folder), "--format", "compressed-tensors"]
    try:
        subprocess.run(generate, check=True)
        write_tokenizer(source, shape)
        subprocess.run(command, check=True)
    finally:
        shutil.rmtree(source, ignore_errors=True)


def make_artifact(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The artifact, unless it is there from an earlier run; its figures."""
    started = time.perf_counter()
    figures: dict[str, Any] = {"made_by": "an earlier run"}
    if not (folder / "config.json").is_file():
        figures["made_by"] = "omnifp4 quantize" if arguments.quantize else "drawn"
        if arguments.quantize:
            quantize_artifact(folder, arguments.shape, arguments.layers)
        else:
            draw_artifact(folder, arguments.shape, arguments.layers, arguments.workers)
        figures["seconds"] = round(time.perf_counter() - started, 1)
    return {**figures, "bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors"))}


def unpack(pack: Path, site: Path, cache: Path) -> None:
    """The packed vLLM into `site`, and the compiled kernels of an earlier run into `cache`."""
    if (site / "vllm").is_dir():
        return
    site.mkdir(parents=True, exist_ok=True)
    cache.mkdir(parents=True, exist_ok=True)
    whole = pack / "vllm.tar.xz"
    if not whole.is_file():
        with whole.open("wb") as out:
            for part in sorted(pack.glob("vllm.tar.xz.part-*")):
                out.write(part.read_bytes())
    for archive, place in ((whole, site), (pack / "cucache.tar.xz", cache)):
        if archive.is_file():
            with tarfile.open(archive, "r:xz") as file:
                file.extractall(place, filter="data")


def write_interpreter(path: Path, python: str, site: Path, cache: Path) -> Path:
    """A program that is Python with the packed vLLM and its variables."""
    variables = {
        "PYTHONPATH": str(site),
        "LD_LIBRARY_PATH": f"{site}/xgrammar:{site}/tvm_ffi/lib:${{LD_LIBRARY_PATH}}",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_USE_DEEP_GEMM": "0",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_CACHE_ROOT": f"{cache}/vllm",
        "TRITON_CACHE_DIR": f"{cache}/triton",
        "CUDA_CACHE_PATH": f"{cache}/cucache",
        "CUDA_CACHE_MAXSIZE": "4294967296",
    }
    lines = [f'export {name}="{value}"' for name, value in variables.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines, f'exec {python} "$@"', ""]))
    path.chmod(0o755)
    return path


def load(url: str, requests: int, clients: int, tokens: int, mix: str, out: Path) -> dict[str, Any]:
    """One load test through the command line: figures from its receipt."""
    command = [sys.executable, "-m", "omnifp4", "bench", "--server", url, "--requests", str(requests)]
    command += ["--concurrency", str(clients), "--max-tokens", str(tokens), "--ignore-eos", "--receipt", str(out)]
    command += ["--mix", mix]
    subprocess.run(command, check=False)
    receipt: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {}
    figures = receipt.get("all_kinds", {})
    return {
        "clients": clients,
        "mix": mix,
        "tokens_per_s": receipt.get("output_tokens_per_s"),
        "failed": figures.get("failed"),
        "ttft_s": figures.get("ttft_s"),
        "tpot_s": figures.get("tpot_s"),
        "speech_rtf": figures.get("speech_rtf"),
        "first_sound_s": figures.get("first_sound_s"),
    }


def run_variant(
    variant: str, artifact: Path, python: Path, folder: Path, arguments: argparse.Namespace, left_s: float
) -> dict[str, Any]:
    """Serve, smoke, load, stop; in `left_s` seconds."""
    engine, extra = VARIANTS[variant]
    port = arguments.port
    record = folder / "cache" / "omnifp4" / "handover" / f"{engine}-{port}" / "handover.json"
    record.unlink(missing_ok=True)
    timeout = min(arguments.timeout, left_s)
    command = [sys.executable, "-m", "omnifp4", "serve", str(artifact), "--engine", engine, "--port", str(port)]
    command += ["--python", str(python), "--context", str(arguments.context), "--start-timeout", str(timeout)]
    command += ["--max-speech-seconds", str(arguments.speech_seconds), *(f"--extra={argument}" for argument in extra)]
    started = time.monotonic()
    result: dict[str, Any] = {"variant": variant}
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
    with subprocess.Popen(command, env=environment) as server:
        while server.poll() is None and not record.is_file() and time.monotonic() - started < timeout + 60:
            time.sleep(0.5)
        if record.is_file() and server.poll() is None:
            receipt = json.loads(record.read_text())
            shutil.copy(record, folder / f"handover-{variant}.json")
            result |= {
                name: receipt[name] for name in ("start_s", "kernels", "memory", "gpu_bytes", "smoke", "verdict")
            }
            tokens = arguments.tokens
            plan = [("text", 1, 4, tokens), ("text", arguments.clients, 2 * arguments.clients, tokens)]
            plan += [("speech", 1, 3, 32), ("speech", 8, 16, 32)] if variant == "omni" else []
            for mix, clients, requests, most in plan:
                if time.monotonic() - started > left_s:
                    result["cut"] = "time was up"
                    break
                out = folder / f"load-{variant}-{mix}-{clients}.json"
                result.setdefault("load", []).append(load(receipt["url"], requests, clients, most, mix, out))
        if server.poll() is None:
            server.send_signal(signal.SIGINT)
        try:
            result["status"] = server.wait(STOP_S)
        except subprocess.TimeoutExpired:
            server.terminate()
            result["status"] = server.wait()
    log = record.with_name("engine.log")
    if log.is_file():
        shutil.copy(log, folder / f"engine-{variant}.log")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pack", type=Path, help="folder of vllm.tar.xz (or its parts) and cucache.tar.xz")
    parser.add_argument("--site", type=Path, help="where it is unpacked, or lies unpacked; FOLDER/site if not given")
    parser.add_argument("--python", help="interpreter with vLLM; with --pack or --site, that which runs the packed one")
    parser.add_argument("--artifact", type=Path, help="serve this one instead of random weights")
    parser.add_argument("--variants", default="text", help="comma list of text, full, omni")
    parser.add_argument("--shape", default=SHAPE, help=f"{SHAPE} or tiny")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--quantize", action="store_true", help="let `omnifp4 quantize` make the artifact")
    parser.add_argument("--deadline", type=float, default=3600.0, help="seconds after which nothing new is begun")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--speech-seconds", type=float, default=10.0, help="most speech of an answer")
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds that a start may take")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, help="copy logs, receipts and figures here")
    arguments = parser.parse_args()
    begin = time.monotonic()
    variants = [name for name in arguments.variants.split(",") if name != "none"]
    if unknown := set(variants) - set(VARIANTS):
        parser.error(f"no variant {', '.join(unknown)}; known: {', '.join(VARIANTS)}, none")
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    python = arguments.python or sys.executable
    site = arguments.site or (folder / "site" if arguments.pack else None)
    if site is not None:
        started = time.perf_counter()
        site = site.resolve()
        if arguments.pack:
            unpack(arguments.pack, site, site.parent / "cache")
        python = str(write_interpreter(site.parent / "engine" / "python", python, site, site.parent / "cache"))
        print(f"packed vLLM ready in {time.perf_counter() - started:.1f} s", flush=True)
    figures: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "context": arguments.context}
    artifact = arguments.artifact or folder / "artifact"
    if arguments.artifact is None:
        figures["artifact"] = make_artifact(artifact, arguments)
        print(f"artifact: {figures['artifact']}", flush=True)
    if arguments.python is None and (torch := import_module("torch")).cuda.is_available():
        figures["device"] = torch.cuda.get_device_name()
    figures["variants"] = []
    for variant in variants:
        left = arguments.deadline - (time.monotonic() - begin)
        if left < LEAST_SECONDS:
            result = {"variant": variant, "status": 1, "cut": f"only {left:.0f} s were left"}
        else:
            result = run_variant(variant, artifact, Path(python), folder, arguments, left - STOP_S / 3)
        figures["variants"].append(result)
        print(json.dumps(result), flush=True)
        if arguments.out is not None:
            keep(folder, arguments.out, figures)
    print(json.dumps(figures))
    sys.exit(any(result["status"] or "load" not in result for result in figures["variants"]))


def keep(folder: Path, out: Path, figures: dict[str, Any]) -> None:
    """Logs, receipts and figures so far, in a folder that outlasts this one."""
    out.mkdir(parents=True, exist_ok=True)
    for path in (*folder.glob("engine-*.log"), *folder.glob("load-*.json"), *folder.glob("handover-*.json")):
        shutil.copy(path, out)
    (out / "vllm_handover.json").write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
