"""Checkpoints on the Hugging Face Hub: their headers without their weights, or the whole of them.

HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE mean what they mean to huggingface_hub, whose session and cache are
used. It is imported only when a model is not a local folder.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from omnifp4.checkpoint.folder import (
    CONFIG_NAME,
    INDEX_NAME,
    SINGLE_SHARD_NAME,
    Checkpoint,
    as_config,
    assemble,
    find_weights,
    list_names,
    open_checkpoint,
    read_json,
)
from omnifp4.checkpoint.hub_requests import (
    HubFiles,
    explained,
    hub_utils,
    retrying,
    status_of,
    timeout_s,
    transport_error,
)
from omnifp4.checkpoint.staging import free_bytes
from omnifp4.errors import CheckpointError, OutputError

THREADS: Final = 16
HUB_ID: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*/[A-Za-z0-9_][A-Za-z0-9._-]*")
HUB_ID_LIMIT: Final = 96
COMMIT: Final = re.compile(r"[0-9a-f]{40}")
MAIN: Final = "main"

NOT_NEEDED: Final = (
    "*.bin", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.ot", "*.onnx", "*.onnx_data", "*.tflite", "*.mlmodel",
    "*.mlpackage/*", "onnx/*", "openvino/*", "coreml/*", "original/*", "*.mp4", "*.gif", ".git*",
)  # fmt: skip
"""Files of a repository that are not downloaded: the same weights in other forms, and media of its page."""


def is_hub_id(model: str) -> bool:
    """Whether MODEL names a repository on the Hub; an existing local folder of that name goes first.

    Raises:
        CheckpointError: it is neither an existing folder nor a possible Hub id.
    """
    try:
        path = Path(model).expanduser()
        if model and path.is_dir():
            return False
        is_there = bool(model) and (path.exists() or path.is_symlink())
    except (OSError, RuntimeError):
        is_there = False
    if is_there:
        raise CheckpointError(
            f"{model}: no folder", hint="give the folder that holds config.json, or a Hub id org/name"
        )
    if is_possible_id(model):
        return True
    raise CheckpointError(
        f"{model or '(empty)'}: neither a local folder nor a Hub id",
        hint="give an existing folder, or org/name as on the Hub",
    )


def is_possible_id(model: str) -> bool:
    """Whether the Hub could have a repository ``org/name`` of this name."""
    return (
        HUB_ID.fullmatch(model) is not None
        and len(model) <= HUB_ID_LIMIT
        and ".." not in model
        and "--" not in model
        and not model.endswith((".", "-", ".git"))
        and not model.partition("/")[0].endswith((".", "-"))
    )


def fetch_headers(model: str, revision: str | None = None) -> Checkpoint:
    """Config and headers of a checkpoint on the Hub, by range requests; no weights are transferred.

    If the local cache has the whole checkpoint at that revision, it is read from there, and `Checkpoint.folder` is
    the cache's folder; else it is None.

    Args:
        model: ``org/name``.
        revision: branch, tag or commit; the default branch if None.

    Raises:
        CheckpointError: not found, gated, offline and not cached, no network, no safetensors weights, or files that
            a local folder would be refused for.
    """
    if not is_possible_id(model):
        raise CheckpointError(f"{model}: no Hub id", hint="a Hub id is org/name")
    if is_offline():
        return _offline_checkpoint(model, revision)
    if revision is not None and COMMIT.fullmatch(revision) and (cached := _cached_checkpoint(model, revision)):
        return cached
    with explained(model, revision):
        try:
            found = _look_up(model, revision)
        except (transport_error(), ConnectionError) as error:
            if status_of(error) is None and (cached := _cached_checkpoint(model, revision)):
                return cached
            raise
        return _cached_checkpoint(model, found.commit) or _fetch(found)


def fetch_model(model: str, revision: str | None = None, *, progress: bool | None = None) -> Path:
    """Download a checkpoint into the local cache, or find it there.

    Its headers are checked before any weights are transferred, and so is the room on the disk.

    Args:
        model: ``org/name``.
        revision: branch, tag or commit; the default branch if None.
        progress: show huggingface_hub's progress bars on stderr; None shows them on a terminal.

    Returns:
        The snapshot's folder in the cache.

    Raises:
        CheckpointError: as `fetch_headers`, or the download is not what the headers said.
        OutputError: the disk is too small.
    """
    checkpoint = fetch_headers(model, revision)
    if is_offline():
        assert checkpoint.folder is not None
        return checkpoint.folder
    if checkpoint.folder is None:
        _check_room(checkpoint, model)
    with explained(model, revision), _progress_bars(sys.stderr.isatty() if progress is None else progress):
        from huggingface_hub import snapshot_download

        try:
            folder = Path(
                snapshot_download(
                    model,
                    revision=revision,
                    library_name="omnifp4",
                    ignore_patterns=[*NOT_NEEDED, *_other_safetensors(model, revision, checkpoint)],
                )
            )
        except OSError as error:
            if status_of(error) is not None or error.errno is None:
                raise
            raise OutputError(f"hub:{model}: cannot be written to the cache: {error.strerror}") from None
    for shard, size in checkpoint.shard_bytes.items():
        path = folder / shard
        if not path.is_file() or path.stat().st_size != size:
            raise CheckpointError(f"{path}: not the {size} bytes that the Hub announced", hint="download it again")
    return folder


def local_folder(model: str, revision: str | None = None) -> Path:
    """The folder of MODEL, downloaded first if it is a Hub id; `~` is the home folder. Raises as `fetch_model`."""
    return fetch_model(model, revision) if is_hub_id(model) else Path(model).expanduser()


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids requests."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


@dataclass(frozen=True)
class _Repository:
    name: str
    commit: str
    files: Collection[str]


def _look_up(model: str, revision: str | None) -> _Repository:
    from huggingface_hub import HfApi

    try:
        api = HfApi(library_name="omnifp4")
        info = retrying(lambda: api.model_info(model, revision=revision, timeout=timeout_s()), f"hub:{model}")
    except (transport_error(), ValueError, KeyError, TypeError, AttributeError) as error:
        # An answer that is no JSON is a ValueError, and to requests a failed transport as well.
        if isinstance(error, transport_error()) and (status_of(error) or not isinstance(error, ValueError)):
            raise
        raise CheckpointError(
            f"hub:{model}: the server's answer is not understood: {type(error).__name__}: {error}",
            hint="check HF_ENDPOINT",
        ) from None
    if not isinstance(info.sha, str) or not COMMIT.fullmatch(info.sha) or info.siblings is None:
        raise CheckpointError(f"hub:{model}: the server names no commit and files", hint="check HF_ENDPOINT")
    return _Repository(model, info.sha, frozenset(sibling.rfilename for sibling in info.siblings))


def _fetch(repository: _Repository) -> Checkpoint:
    files = HubFiles(repository.name, repository.commit)
    if CONFIG_NAME not in repository.files:
        raise CheckpointError(f"{files.location}/{CONFIG_NAME}: no such file, so it is no checkpoint")
    config = as_config(files.read_json(CONFIG_NAME), f"{files.location}/{CONFIG_NAME}")
    weights = find_weights(files.location, repository.files, lambda: files.read_json(INDEX_NAME))
    if missing := [shard for shard in weights.shards if shard not in repository.files]:
        raise CheckpointError(f"{files.location}/{missing[0]}: missing, though the index names it")
    pool = ThreadPoolExecutor(min(THREADS, len(weights.shards)), thread_name_prefix="hub")
    try:
        found = list(pool.map(files.read_shard_header, weights.shards))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    headers = ((shard, *header) for shard, header in zip(weights.shards, found, strict=True))
    return assemble(files.location, config, weights, headers, None)


def _cached_snapshot(model: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model, CONFIG_NAME, revision=revision or MAIN)
    return Path(found).parent if isinstance(found, str) else None


def _cached_checkpoint(model: str, revision: str | None) -> Checkpoint | None:
    """The checkpoint in the cache if all its shards are there."""
    snapshot = _cached_snapshot(model, revision)
    if snapshot is None or _missing_weights(snapshot):
        return None
    return replace(open_checkpoint(snapshot), location=f"hub:{model}@{snapshot.name}")


def _missing_weights(snapshot: Path) -> str:
    """The first shard that a snapshot lacks; empty if it is whole."""
    names = list_names(snapshot)
    if not any(name.endswith(".safetensors") for name in names):
        return SINGLE_SHARD_NAME
    weights = find_weights(str(snapshot), names, lambda: read_json(snapshot / INDEX_NAME))
    return next((shard for shard in weights.shards if not (snapshot / shard).exists()), "")


def _offline_checkpoint(model: str, revision: str | None) -> Checkpoint:
    from huggingface_hub import constants

    subject = f"hub:{model}" + (f"@{revision}" if revision else "")
    snapshot = _cached_snapshot(model, revision)
    if snapshot is None:
        raise CheckpointError(
            f"{subject}: not in the local cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids to fetch it; "
            f"nor is there a local folder {model}",
            hint="unset HF_HUB_OFFLINE, or set HF_HOME to the cache that has it",
        )
    if missing := _missing_weights(snapshot):
        raise CheckpointError(
            f"{subject}: the local cache lacks {snapshot / missing}, and HF_HUB_OFFLINE forbids to fetch it",
            hint="unset HF_HUB_OFFLINE",
        )
    return replace(open_checkpoint(snapshot), location=f"hub:{model}@{snapshot.name}")


def _other_safetensors(model: str, revision: str | None, checkpoint: Checkpoint) -> list[str]:
    """Safetensors files of the repository that are not shards of its checkpoint."""
    if checkpoint.folder is not None:
        return ["*.safetensors"]
    names = _look_up(model, revision).files
    return [name for name in names if name.endswith(".safetensors") and name not in checkpoint.shard_bytes]


def _check_room(checkpoint: Checkpoint, model: str) -> None:
    from huggingface_hub import constants

    commit = checkpoint.location.rpartition("@")[2]
    snapshot = _cached_snapshot(model, commit)
    there = {shard for shard in checkpoint.shard_bytes if snapshot is not None and (snapshot / shard).exists()}
    needed = sum(size for shard, size in checkpoint.shard_bytes.items() if shard not in there)
    cache = Path(constants.HF_HUB_CACHE)
    begun = cache / f"models--{model.replace('/', '--')}" / "blobs"
    needed -= sum(path.stat().st_size for path in begun.glob("*.incomplete"))
    if needed > (free := free_bytes(cache)):
        raise OutputError(
            f"{cache}: {free / 1e9:.1f} GB are free where the download of {model} needs {needed / 1e9:.1f} GB",
            hint="free some, or set HF_HOME to a folder on a larger disk",
        )


@contextmanager
def _progress_bars(shown: bool) -> Iterator[None]:
    utils = hub_utils()
    change = not shown and not utils.are_progress_bars_disabled()
    if change:
        utils.disable_progress_bars()
    try:
        yield
    finally:
        if change:
            utils.enable_progress_bars()
