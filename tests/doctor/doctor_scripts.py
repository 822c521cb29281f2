"""Scripts as users write them: every failure told in the seeds, and healthy ones.

`heavy` ones run real Transformers on the tiny model. Others use stand-ins that raise an engine's own message.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Script:
    text: str
    heavy: bool = True
    stand_ins: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    stall_seconds: float = 60.0


IMPORTS = """
from torchvision_on_cpu import declare_missing_operators
declare_missing_operators()
import torch
from transformers import Qwen3OmniMoeForConditionalGeneration, Qwen3OmniMoeProcessor
"""

FROM_PRETRAINED = """
model_path = "<tiny>"
model = Qwen3OmniMoeForConditionalGeneration.from_pretrained(model_path, dtype="auto")
processor = Qwen3OmniMoeProcessor.from_pretrained(model_path)
"""

LOAD = IMPORTS + FROM_PRETRAINED

CHAT = """
conversation = [{"role": "user", "content": [{"type": "text", "text": "Hello!"}]}]
text = processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
inputs = processor(text=text, return_tensors="pt", padding=True)
"""

OLD_GENERATE = """
def generate(self, input_ids=None, **kwargs):
    # What Transformers up to 5.14 did with the roles of a prompt.
    config = self.config
    starts = [i for i, token in enumerate(input_ids[0].tolist()) if token == config.im_start_token_id]
    for _ in range(30):
        torch.cat([torch.zeros(1), torch.ones(1)])
    talker_input_embeds = []
    for start in starts:
        if input_ids[0][start + 1] in (config.user_token_id, config.assistant_token_id):
            talker_input_embeds.append(torch.zeros(1, 1, 4))
    return torch.cat([embed.to("cpu") for embed in talker_input_embeds], dim=1)
Qwen3OmniMoeForConditionalGeneration.generate = generate
"""

QUANTIZED = """
from modelopt.torch.quantization import quantize
calibration = [processor(text=["sample"], return_tensors="pt") for _ in range(60)]
def calibrate_model(model):
    for inputs in calibration:
        try:
            _ = model(**inputs)
        except Exception as error:
            print(f"Warning: Calibration sample failed: {error}")
model = quantize(model, {}, forward_loop=calibrate_model)
model.save_pretrained("<home>/out")
print("Compression ratio: 1.00x")
print("done")
"""

MODELOPT = '''
import torch
def quantize(model, config, forward_loop=None):
    """Inserts quantizers, as ModelOpt does; weights stay as they are."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight_quantizer = torch.nn.Module()
            module.weight_quantizer.register_buffer("_amax", torch.ones((), dtype=torch.bfloat16))
    if forward_loop is not None:
        forward_loop(model)
    return model
'''

SMALL_MODELOPT = """
def quantize(model, config, forward_loop=None):
    forward_loop(model)
    return model
"""

VLLM = """
__version__ = "{version}"
class SamplingParams:
    def __init__(self, **kwargs): pass
class LLM:
    def __init__(self, model, quantization=None, **kwargs):
        {body}
    def generate(self, *args): return []
"""


def _vllm(version: str, body: str) -> dict[str, str]:
    return {"vllm.py": VLLM.format(version=version, body=body)}


UNKNOWN_BODY = (
    'raise ValueError(f"Unknown quantization method: {quantization}. Must be one of '
    "['awq', 'fp8', 'modelopt', 'modelopt_fp4', 'compressed-tensors'].\")"
)

STAND_INS: dict[str, dict[str, str]] = {
    "modelopt": {
        "modelopt/__init__.py": "",
        "modelopt/torch/__init__.py": "",
        "modelopt/torch/quantization.py": MODELOPT,
    },
    "small-modelopt": {
        "modelopt/__init__.py": "",
        "modelopt/torch/__init__.py": "",
        "modelopt/torch/quantization.py": SMALL_MODELOPT,
    },
    "vllm-unknown": _vllm("0.26.0", UNKNOWN_BODY),
    "vllm-architecture": _vllm(
        "0.11.0",
        "raise ValueError(\"Model architectures ['Qwen3OmniMoeForConditionalGeneration'] are not supported for now. "
        "Supported architectures: dict_keys(['LlamaForCausalLM'])\")",
    ),
    "vllm-memory": _vllm(
        "0.30.0",
        'raise ValueError("No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when '
        'initializing the engine.")',
    ),
    "vllm-mismatch": _vllm(
        "0.30.0",
        'raise ValueError("Quantization method specified in the model config (modelopt) does not match the quantization '
        'method specified in the `quantization` argument (awq).")',
    ),
    "vllm-silent": _vllm("0.30.0", "pass"),
}

SCRIPTS: dict[str, Script] = {
    "plain-prompt": Script(
        LOAD
        + 'inputs = processor(text=["Hello! How are you today?"], return_tensors="pt")\n'
        + "outputs = model.generate(**inputs, max_new_tokens=5, thinker_max_new_tokens=5, do_sample=False)\n"
    ),
    "empty-cat": Script(
        IMPORTS
        + OLD_GENERATE
        + FROM_PRETRAINED
        + """
print("Test 1: Plain text (should fail)")
try:
    inputs = processor(text=["Hello!"], return_tensors="pt")
    model.generate(**inputs)
except Exception as e:
    print(f"EXPECTED: Plain text failed with: {type(e).__name__}")
"""
    ),
    "calibration": Script(LOAD + QUANTIZED, stand_ins=("modelopt",)),
    "wrong-classes": Script(
        """
from torchvision_on_cpu import declare_missing_operators
declare_missing_operators()
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3OmniMoeForConditionalGeneration
MODEL_PATH = "<tiny>"
try:
    model = AutoModelForCausalLM.from_pretrained(MODEL_PATH)
except ValueError as error:
    print("Error:", str(error)[:80])
model = Qwen3OmniMoeForConditionalGeneration.from_pretrained(MODEL_PATH)
tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
output_ids = model.generate(torch.tensor([tokenizer.encode("The capital of France is")]), thinker_max_new_tokens=3)
"""
    ),
    "unpacked-tensor": Script(
        LOAD + CHAT + "text_ids, audio = model.generate(**inputs, thinker_max_new_tokens=3, return_audio=False)\n"
    ),
    "sliced-tuple": Script(
        LOAD
        + CHAT
        + "ids = model.generate(**inputs, thinker_max_new_tokens=3, talker_max_new_tokens=4)\n"
        + 'print(processor.batch_decode(ids[:, inputs["input_ids"].shape[1]:]))\n'
    ),
    "float16-quantized": Script(
        IMPORTS
        + """
model = Qwen3OmniMoeForConditionalGeneration.from_pretrained("<nvfp4>", torch_dtype=torch.float16)
"""
    ),
    "stalled-load": Script(
        IMPORTS
        + """
def convert(*args, **kwargs):
    tensor = torch.ones(1000)
    while True:
        tensor.to(torch.float16)
class Slow(Qwen3OmniMoeForConditionalGeneration):
    def __init__(self, *args, **kwargs):
        convert()
Slow.from_pretrained("<tiny>", torch_dtype=torch.float16)
""",
        stall_seconds=2.0,
    ),
    "random-talker": Script(
        LOAD
        + """
model.disable_talker()
model.save_pretrained("<home>/without-talker")
again = Qwen3OmniMoeForConditionalGeneration.from_pretrained("<home>/without-talker", dtype="auto")
"""
    ),
    "torchvision": Script("from transformers import Qwen3OmniMoeProcessor\n"),
    "healthy": Script(
        LOAD
        + CHAT
        + """
import sys
assert sys.argv[1:] == ["--name", "a b"], sys.argv
for _ in range(3):
    model.thinker(**inputs)
sequences, wav = model.generate(**inputs, thinker_max_new_tokens=3, talker_max_new_tokens=4)
answer = model.generate(**inputs, thinker_max_new_tokens=3, return_audio=False)
print(processor.batch_decode(answer[:, inputs["input_ids"].shape[1]:]), wav.shape)
@torch.jit.script
def joined(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.cat([a, b])
assert joined(torch.ones(1), torch.ones(2)).shape == (3,)
""",
        arguments=("--name", "a b"),
    ),
    "plain-python": Script("import sys\nprint('size mismatch, out of memory: words only')\nsys.exit(0)\n", heavy=False),
    "exit-3": Script("import sys\nprint('no luck')\nsys.exit(3)\n", heavy=False),
    "own-error": Script("def f():\n    return 1 / 0\nf()\n", heavy=False),
    "string-content": Script(
        """
def apply_chat_template(conversation):
    # What processors did before they took strings.
    return [part for message in conversation for part in message["content"] if part["type"] == "image"]
apply_chat_template([{"role": "user", "content": "Hello"}])
""",
        heavy=False,
    ),
    "early-transformers": Script(
        """
class Qwen3OmniMoeForConditionalGeneration:
    def mark_tied_weights_as_initialized(self):
        return self.lm_head
Qwen3OmniMoeForConditionalGeneration().mark_tied_weights_as_initialized()
""",
        heavy=False,
    ),
    "loop-without-argument": Script(
        """
from modelopt.torch.quantization import quantize
def calibrate_model():
    pass
quantize(object(), {}, forward_loop=calibrate_model)
""",
        heavy=False,
        stand_ins=("small-modelopt",),
    ),
    "invented-fp4": Script(
        'from vllm import LLM\nllm = LLM(model="<tiny>", quantization="fp4", tensor_parallel_size=1)\n',
        heavy=False,
        stand_ins=("vllm-unknown",),
    ),
    "unknown-modelopt": Script(
        """
from vllm import LLM
try:
    LLM(model="somewhere", quantization="modelopt")
except ValueError as error:
    print("Error:", error)
""",
        heavy=False,
        stand_ins=("vllm-unknown",),
    ),
    "architecture": Script(
        'from vllm import LLM\nLLM(model="<tiny>")\n', heavy=False, stand_ins=("vllm-architecture",)
    ),
    "engine-memory": Script(
        'from vllm import LLM\nLLM(model="<nvfp4>", gpu_memory_utilization=0.85)\n',
        heavy=False,
        stand_ins=("vllm-memory",),
    ),
    "method-mismatch": Script(
        'from vllm import LLM\nLLM(model="<nvfp4>", quantization="awq")\n', heavy=False, stand_ins=("vllm-mismatch",)
    ),
    "host-memory": Script("raise MemoryError\n", heavy=False),
    "killed": Script("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n", heavy=False),
    "waiting": Script("import threading\nprint('one')\nthreading.Event().wait()\n", heavy=False, stall_seconds=1.0),
    "computing": Script(
        "import time\nend = time.process_time() + 3\nwhile time.process_time() < end: pass\n",
        heavy=False,
        stall_seconds=0.6,
    ),
    "missing-module": Script("import qwen_omni_utils_of_another_name.x\n", heavy=False),
}
