#!/usr/bin/env bash
# The peers' own libraries judge our artifacts, each in an environment of its own under .venv-interop.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
home=.venv-interop
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

environment() { # name, requirement files: the first with dependencies, the others without
    local folder="$home/$1"
    shift
    if [ ! -e "$folder/.ready" ]; then
        "$python" -m venv "$folder"
        "$folder/bin/python" -m pip install --quiet --upgrade pip
        # PyTorch first and pinned, so that nothing pulls another build of it.
        "$folder/bin/python" -m pip install --quiet torch==2.13.0
        "$folder/bin/python" -m pip install --quiet -r "interop/$1"
        [ $# -lt 2 ] || "$folder/bin/python" -m pip install --quiet --no-deps -r "interop/$2"
        touch "$folder/.ready"
    fi
}

environment compressed-tensors requirements-compressed-tensors.txt
environment modelopt requirements-modelopt.txt
environment llm-compressor requirements-llm-compressor.txt
environment vllm requirements-vllm.txt requirements-vllm-no-deps.txt

.venv/bin/python interop/export_expected.py "$work"
for artifact in "$work"/*.compressed-tensors.*; do
    [ -d "$artifact" ] || continue
    "$home/compressed-tensors/bin/python" interop/check_compressed_tensors.py "$artifact" "$artifact.expected.safetensors"
done
for artifact in "$work"/*.modelopt.*; do
    [ -d "$artifact" ] || continue
    "$home/modelopt/bin/python" interop/check_modelopt.py "$artifact" "$artifact.expected.safetensors"
done
# The calibrated algorithms beside ModelOpt's own, on the same weights and Hessians.
.venv/bin/python interop/export_calibrated.py "$work/calibrated.safetensors"
"$home/modelopt/bin/python" interop/check_calibrated.py "$work/calibrated.safetensors"
# GPTQ of several experts at once beside llm-compressor's, and AWQ on one model beside both.
quiet=(env TQDM_DISABLE=1 LLM_COMPRESSOR_LOG_DISABLED=true)
.venv/bin/python interop/export_gptq.py "$work/gptq.safetensors"
"${quiet[@]}" "$home/llm-compressor/bin/python" interop/check_gptq_llm_compressor.py "$work/gptq.safetensors"
.venv/bin/python interop/export_awq.py "$work/awq"
"$home/modelopt/bin/python" interop/check_awq_modelopt.py "$work/awq"
"${quiet[@]}" "$home/llm-compressor/bin/python" interop/check_awq_llm_compressor.py "$work/awq"
# vLLM builds Qwen3-Omni's head without a name, which no ModelOpt ignore entry can match: a note, not a failure.
"$home/vllm/bin/python" interop/check_vllm_config.py --allow-nameless-head "$work"/*.sweep
# The commands that the hand-over makes, as vLLM's own parser and config see them.
.venv/bin/python interop/export_commands.py "$work/handover"
"$home/vllm/bin/python" interop/check_vllm_command.py "$work/handover/commands.json"
echo "interop: all peers agree"
