"""Everything of an artifact that is not weights: config, index, side files, receipt, model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from omnifp4.checkpoint.branch import with_branch
from omnifp4.checkpoint.folder import CONFIG_NAME, INDEX_NAME
from omnifp4.checkpoint.output import write_json
from omnifp4.quantization.decisions import Job
from omnifp4.receipt.base import as_text, package_version

PRODUCER_NAME: Final = "omnifp4"


def source_name(folder: Path) -> tuple[str, str]:
    """What a source is called, without telling where it lies: folder name, or Hub id; and the Hub's commit, or ""."""
    folder = folder.expanduser().absolute()
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return "/".join(repository.split("--")[1:]), folder.name
    return as_text(folder.resolve().name), ""


def artifact_config(job: Job) -> dict[str, Any]:
    """The source's config with the top-level ``quantization_config`` that engines look for."""
    config = {key: value for key, value in job.source.checkpoint.config.items() if key != "quantization_config"}
    if dialect := job.output_format.dialect:
        producer = {"name": PRODUCER_NAME, "version": package_version()}
        quantization = dialect.quantization_config(job.recipe.activations, job.ignore(), producer, job.module_schemes())
        config["quantization_config"] = with_branch(quantization, job.recipe.rank) if job.recipe.rank else quantization
    return config


def write_config_and_index(folder: Path, config: Mapping[str, Any], job: Job) -> None:
    """Write config.json and, for several shards, the index. Raises OSError."""
    write_json(folder / CONFIG_NAME, config)
    if index := job.output.index():
        write_json(folder / INDEX_NAME, index)
