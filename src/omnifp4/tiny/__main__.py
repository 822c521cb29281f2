"""``python -m omnifp4.tiny OUT``: write the trained tiny omni model, or random weights at a released model's shapes."""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from omnifp4.errors import ModelError, OmniFP4Error
from omnifp4.tiny.checkpoint import (
    REAL_SHARD_BYTES,
    RELEASED_CONFIGS,
    TINY_SHARD_BYTES,
    released_config,
    write_random_checkpoint,
    write_tiny_omni,
)

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_bytes(text: str) -> int:
    """Reads a size such as ``5GB``, ``500MB`` or ``1000000`` (decimal units, as the Hub counts)."""
    number = text.strip().upper().removesuffix("B")
    unit = number[-1:] if number[-1:] in UNITS else ""
    try:
        size = int(float(number.removesuffix(unit)) * UNITS[unit])
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB or 500MB") from None
    if size < 1:
        raise argparse.ArgumentTypeError(f"a size must be positive, not {text!r}")
    return size


def parse_count(text: str) -> int:
    try:
        count = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if count < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {count}")
    return count


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="python -m omnifp4.tiny",
        description="Write the trained tiny Qwen3-Omni checkpoint, or random weights at its or a real config's shapes.",
    )
    result.add_argument("out", metavar="OUT", type=Path, help="folder to write; must be new or empty")
    shape = result.add_mutually_exclusive_group()
    shape.add_argument("--config", metavar="FILE", type=Path, help="random weights at the shapes of this config.json")
    shape.add_argument("--real", choices=sorted(RELEASED_CONFIGS), help="the same, of a released model")
    shape.add_argument("--random", action="store_true", help="random weights at the shapes of a still smaller config")
    result.add_argument(
        "--layers", type=parse_count, metavar="N", help="decoder layers of the thinker, of random weights"
    )
    result.add_argument("--shard-bytes", type=parse_bytes, metavar="SIZE", help="most data in one file, such as 5GB")
    result.add_argument("--seed", type=int, help="of random weights (default: 0)")
    result.add_argument("--text-only", action="store_true", help="with --config or --real: the thinker's decoder alone")
    result.add_argument("--workers", type=parse_count, metavar="N", help="with --config or --real: threads")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parse = parser()
    options = parse.parse_args(arguments)
    real = options.config is not None or options.real is not None
    if not real and (options.text_only or options.workers is not None):
        parse.error("--text-only and --workers need --config or --real")
    try:
        start = time.perf_counter()
        if real:
            config = _read_config(options.config) if options.config is not None else released_config(options.real)
            write_random_checkpoint(
                config,
                options.out,
                seed=options.seed or 0,
                shard_bytes=options.shard_bytes or REAL_SHARD_BYTES,
                layers=options.layers,
                text_only=options.text_only,
                workers=options.workers,
                on_bytes=_progress() if sys.stderr.isatty() else None,
            )
        else:
            write_tiny_omni(
                options.out,
                random_weights=options.random,
                seed=options.seed,
                layers=options.layers,
                shard_bytes=options.shard_bytes or TINY_SHARD_BYTES,
            )
        seconds = time.perf_counter() - start
    except OmniFP4Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    size = sum(path.stat().st_size for path in options.out.glob("*.safetensors"))
    print(f"{options.out}: {size / 1e6:,.1f} MB of weights in {seconds:.1f} s ({size / 1e6 / seconds:,.0f} MB/s)")
    return 0


def _read_config(path: Path) -> dict[str, object]:
    try:
        config = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ModelError(f"cannot read the config {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ModelError(f"the config {path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"the config {path} is not a JSON object")
    return config


def _progress() -> Callable[[int], None]:
    lock = threading.Lock()
    written = 0
    shown_at = 0.0

    def on_bytes(count: int) -> None:
        nonlocal written, shown_at
        with lock:
            written += count
            now = time.perf_counter()
            if now - shown_at >= 0.5:
                shown_at = now
                print(f"\r{written / 1e9:,.1f} GB", end="", file=sys.stderr, flush=True)

    return on_bytes


if __name__ == "__main__":
    sys.exit(main())
