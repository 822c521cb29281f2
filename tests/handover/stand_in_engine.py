"""A stand-in for the interpreter of an engine's environment: it answers the probe, and as `-m vllm… serve` it is a server.

STAND_IN says how it behaves: ok, or the name of a failure in `FAILURES`; or hang, deaf (never healthy), dies (after
the first answer), slow-stop (ignores the interrupt). Log lines are those of vLLM 0.26.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

START = """INFO 11-21 15:00:00 [api_server.py:677] vLLM API server version 0.26.0
(EngineCore pid=77) INFO 11-21 15:00:01 [core.py:100] Initializing a V1 LLM engine (v0.26.0) with config
(EngineCore pid=77) INFO 11-21 15:00:02 [cuda.py:341] Using FLASH_ATTN attention backend out of potential backends
(EngineCore pid=77) INFO 11-21 15:00:02 [__init__.py:933] Using MarlinNvFp4LinearKernel for NVFP4 GEMM
(EngineCore pid=77) INFO 11-21 15:00:02 [nvfp4.py:220] Using 'MARLIN' NvFp4 MoE backend out of potential backends: ['FLASHINFER_TRTLLM', 'MARLIN', 'EMULATION'].
(EngineCore pid=77) Loading safetensors checkpoint shards:  50% Completed | 1/2\r(EngineCore pid=77) INFO 11-21 15:00:03 [gpu_model_runner.py:5348] Model loading took 16.91 GiB memory and 9.100000 seconds
(EngineCore pid=77) WARNING 11-21 15:00:03 [marlin.py:35] Your GPU does not have native support for FP4 computation but FP4 quantization is being used.
(EngineCore pid=77) INFO 11-21 15:00:04 [gpu_worker.py:561] Available KV cache memory: 104.20 GiB
(EngineCore pid=77) INFO 11-21 15:00:04 [kv_cache_utils.py:2177] GPU KV cache size: 1,138,112 tokens
"""
EMULATED = """(EngineCore pid=77) INFO 11-21 15:00:02 [__init__.py:978] Using EmulationNvFp4LinearKernel for NVFP4 GEMM
(EngineCore pid=77) INFO 11-21 15:00:02 [nvfp4.py:280] Using 'EMULATION' NvFp4 MoE backend out of potential backends: ['MARLIN', 'EMULATION'].
"""
FAILURES = {
    "serve.port": "OSError: [Errno 98] Address already in use",
    "serve.arguments": "vllm: error: unrecognized arguments: --moe-backend marlin",
    "serve.free-memory": "ValueError: Free memory on device cuda:0 (20.1/139.8 GiB) on startup is less than desired GPU memory utilization (0.9, 125.8 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes.",
    "serve.context": "ValueError: To serve at least one request with the model's max seq len (65536), (6.0 GiB KV cache is needed, which is larger than the available KV cache memory (1.5 GiB). Based on the available memory, the estimated maximum model length is 16384. Try increasing `gpu_memory_utilization`",
    "serve.no-cache-memory": "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when initializing the engine",
    "serve.experts-backend": "ValueError: moe_backend='triton' is not supported for NvFP4 MoE. Expected one of ['cutlass', 'marlin'].",
    "serve.no-kernel": "NotImplementedError: No NvFp4 MoE backend supports the deployment configuration.",
    "serve.heads": "Value error, Total number of attention heads (32) must be divisible by tensor parallel size (3).",
    "serve.world-size": "ValueError: World size (4) is larger than the number of available GPUs (2) in this node. If this is intentional and you are using:",
    "serve.no-gpu": "RuntimeError: Failed to infer device type, please set the environment variable",
    "serve.driver": "RuntimeError: The NVIDIA driver on your system is too old (found version 12040).",
    "serve.weights-names": "ValueError: There is no module or parameter named 'thinker.model.language_model' in Qwen3OmniMoeThinkerForConditionalGeneration",
    "serve.tokenizer": "OSError: Can't load tokenizer for '/models/x'. If you were trying to load it from 'https://huggingface.co/models'",
    "serve.package": "ModuleNotFoundError: No module named 'flashinfer'",
    "serve.import": "ImportError: libcudart.so.13: cannot open shared object file: No such file or directory",
    "serve.config": "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n  Value error, the checkpoint and the argument do not agree",
    "serve.killed": "RuntimeError: Engine core proc EngineCore exited with code -9",
    "serve.shared-memory": "RuntimeError: unable to allocate shared memory(shm) for file </torch_1>: No space left on device",
    "serve.stage": "RuntimeError: Stage-1 engine initialization timed out after 300 s",
    "vllm.invented-method": "ValueError: Unknown quantization method: nvfp4. Must be one of ['awq', 'modelopt_fp4'].",
    "vllm.architecture": "ValueError: Model architectures ['Qwen3OmniMoeForConditionalGeneration'] are not supported for now. Supported architectures: dict_keys([])",
    "vllm.method-mismatch": "ValueError: Quantization method specified in the model config (modelopt_fp4) does not match the quantization method specified in the `quantization` argument (awq).",
    "memory.gpu": "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.6 GiB",
    "serve.unknown": "KeyError: 'nobody has seen this before'",
}


def probe(names: list[str]) -> None:
    versions = {"vllm": "0.26.0", "vllm-omni": "0.26.0", "torch": "2.11.0", "transformers": "5.17.0"}
    versions |= json.loads(os.environ.get("STAND_IN_VERSIONS", "{}"))
    found = {name: versions[name] for name in names if versions.get(name)}
    print(json.dumps({"python": "3.12.3", "prefix": "/elsewhere", "packages": found, "places": ["/elsewhere"]}))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    mode = "ok"
    model = "m"
    omni = False
    answers = 0

    def log_message(self, format: str, *arguments: object) -> None:
        return

    def _json(self, value: object, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        if self.path == "/health":
            self._json({}, 503 if self.mode == "deaf" else 200)
        elif self.path == "/version":
            self._json({"version": "0.26.0"})
        else:
            self._json({"data": [{"id": self.model, "owned_by": "vllm"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = os.environ.get("VLLM_API_KEY")
        if key and self.headers.get("Authorization") != f"Bearer {key}":
            self._json({"error": {"message": "Unauthorized"}}, 401)
            return
        if body["model"] != self.model:
            self._json({"error": {"message": f"The model `{body['model']}` does not exist."}}, 404)
            return
        if self.mode == "dies":
            print("torch.AcceleratorError: CUDA error: an illegal memory access was encountered", flush=True)
            os._exit(1)
        if self.mode == "no-pictures" and "image_url" in json.dumps(body):
            self._json({"error": {"message": "At most 0 image(s) may be provided in one prompt."}}, 400)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        count = min(body["max_tokens"], 8)
        self._event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        for number in range(count):
            time.sleep(0.002)
            self._event({"choices": [{"index": 0, "delta": {"content": f" w{number}"}}]})
        self._event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        if self.omni and "audio" in body["modalities"]:
            sound = base64.b64encode(b"\0\0" * 12000).decode()
            for _ in range(2):
                chunk = {
                    "modality": "audio",
                    "choices": [{"index": 0, "delta": {"content": sound}}],
                    "usage": {"completion_tokens": 0},
                }
                self._event(chunk)
        self._event({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": count}})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, value: object) -> None:
        self.wfile.write(f"data: {json.dumps(value)}\n\n".encode())
        self.wfile.flush()


def serve(arguments: list[str]) -> None:
    mode = os.environ.get("STAND_IN", "ok")
    if record := os.environ.get("STAND_IN_RECORD"):
        Path(record).write_text(
            json.dumps({"arguments": arguments, "plugins": os.environ.get("VLLM_PLUGINS"), "pid": os.getpid()})
        )
    print(START + (EMULATED if mode == "emulated" else ""), flush=True)
    if mode in FAILURES:
        print(f"(EngineCore pid=77) ERROR 11-21 15:00:05 [core.py:1] {FAILURES[mode]}", flush=True)
        sys.exit(1)
    if mode == "hang":
        time.sleep(3600)
    Handler.mode, Handler.omni = mode, "--omni" in arguments
    Handler.model = arguments[arguments.index("--served-model-name") + 1]
    address = arguments[arguments.index("--host") + 1], int(arguments[arguments.index("--port") + 1])
    server = ThreadingHTTPServer(address, Handler)
    server.daemon_threads = True
    if mode == "slow-stop":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGINT, lambda *_: threading.Thread(target=server.shutdown).start())
    print("INFO:     Application startup complete.", flush=True)
    server.serve_forever(poll_interval=0.05)
    print("INFO:     Application shutdown complete.", flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "-c" and "torch.cuda" in sys.argv[2]:
        print(json.dumps({"devices": [["a GPU", 150 * 10**9, 149 * 10**9, "9.0"]]}))
    elif sys.argv[1] == "-c":
        probe(sys.argv[3:])
    elif sys.argv[1] == "-m":
        serve(sys.argv[3:])
