"""Asks vLLM's own argument parser, and vLLM-Omni's where it is installed, about the commands that the hand-over makes.

    python check_vllm_command.py commands.json

For each command: the engine's parser must take every argument; kernel backends must be values that its config knows;
and a deploy file must load as vLLM-Omni's own schema, with every stage where the file put it. No model is loaded.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from check_vllm_config import let_torchvision_import  # noqa: F401 - its import declares what torchvision lacks here
from tensors import Usage, run
from vllm.config.kernel import KernelConfig
from vllm.utils.argparse_utils import FlexibleArgumentParser

try:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
except ModuleNotFoundError:  # until 0.31 or so it stood elsewhere
    from vllm.entrypoints.openai.cli_args import make_arg_parser, validate_parsed_serve_args

HAS_OMNI = importlib.util.find_spec("vllm_omni") is not None


def parse(engine: str, arguments: list[str]) -> argparse.Namespace:
    """The arguments as the engine's `serve` parses them; exits with status 2 on one that it does not know."""
    parsed: argparse.Namespace
    if engine == "vllm":
        parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)
        validate_parsed_serve_args(parsed)
        return parsed
    from vllm_omni.entrypoints.cli.serve import OmniServeCommand
    from vllm_omni.utils.tracking_parser import TrackingArgumentParser

    parser = TrackingArgumentParser()
    command = OmniServeCommand()
    command.subparser_init(parser.add_subparsers(dest="subparser"))
    parsed = parser.parse_args(["serve", *arguments])
    command.validate(parsed)
    return parsed


def check_deploy(path: Path, text: str) -> str:
    """Loads a deploy file as vLLM-Omni does, and tells its stages.

    Raises:
        ValueError: a stage is not what the file says, or a backend is unknown.
    """
    from vllm_omni.config.stage_config import load_deploy_config

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    deploy = load_deploy_config(path)
    told = []
    for stage in deploy.stages:
        seed = (stage.default_sampling_params or {}).get("seed")
        if seed is None:
            raise ValueError(f"stage {stage.stage_id} has no seed")
        extras = stage.engine_extras
        unknown = set(extras) - {"moe_backend", "linear_backend", "enable_prefix_caching", "enable_chunked_prefill"}
        if unknown:
            raise ValueError(f"stage {stage.stage_id} has {sorted(unknown)}, which is in no schema")
        check_backends(extras)
        told.append(f"{stage.stage_id} on {stage.devices} (moe {extras.get('moe_backend', '-')})")
    return "stages " + ", ".join(told)


def check_backends(values: dict[str, Any]) -> None:
    """Raises ValueError if vLLM has no backend of that name, or refuses it for NVFP4."""
    from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import map_nvfp4_backend

    moe, linear = values.get("moe_backend", "auto"), values.get("linear_backend", "auto")
    KernelConfig(moe_backend=moe, linear_backend=linear)
    if moe != "auto":
        map_nvfp4_backend(moe)


def check(arguments: list[str]) -> int:
    """Runs the check on `commands.json`; returns the failures."""
    if len(arguments) != 1:
        raise Usage("usage: check_vllm_command.py commands.json")
    failures = 0
    for command in json.loads(Path(arguments[0]).read_text()):
        name, engine = command["name"], command["engine"]
        try:
            if engine == "vllm-omni" and not HAS_OMNI:
                print(f"note {name}: vllm-omni is not installed here: not checked")
                continue
            parsed = parse(engine, command["arguments"])
            detail = f"{len(command['arguments'])} arguments, context {parsed.max_model_len}, moe {parsed.moe_backend}"
            check_backends({"moe_backend": parsed.moe_backend, "linear_backend": parsed.linear_backend})
            for path, text in command["files"].items():
                detail = check_deploy(Path(path), text)
            print(f"ok   {name}: {detail}")
        except (SystemExit, ValueError) as error:
            failures += 1
            print(f"FAIL {name}: {error}")
    return failures


if __name__ == "__main__":
    run(check, sys.argv[1:])
