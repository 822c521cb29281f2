"""llm-compressor's own AWQ beside ours, on the same model and sequences.

    python check_awq_llm_compressor.py FOLDER

FOLDER is from export_awq.py. `oneshot` runs AWQModifier with the scheme NVFP4A16, and its folds are read off the weights that it
scaled. It scales the same channels as we do: o_proj is left out. Its search looks at what the attention gives,
and not at q, k and v, whose errors are compared here.
"""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from awq_judge import GROUPS, Exported, compare
from tensors import Checkpoint, Usage, run
from torch.utils.data import DataLoader

MAPPINGS = (
    ("re:.*input_layernorm$", ["re:.*q_proj$", "re:.*k_proj$", "re:.*v_proj$"]),
    ("re:.*post_attention_layernorm$", ["re:.*gate_proj$", "re:.*up_proj$"]),
    ("re:.*up_proj$", ["re:.*down_proj$"]),
)
STEPS = 12
"""No factors, and exponents from 0 to 1 in steps of a tenth, which are ModelOpt's and ours."""


def quantize(folder: Path, tokens: torch.Tensor, *, awq: bool) -> dict[str, torch.Tensor]:
    """Parameters of the model and its scales, after AWQ and rounding, or after rounding alone."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache
    from transformers import AutoModelForCausalLM

    # 0.14 pins memory for copies to a GPU even where there is none.
    IntermediatesCache.pin_memory = lambda *_: None
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    recipe = [AWQModifier(mappings=[AWQMapping(*mapping) for mapping in MAPPINGS], n_grid=STEPS)] if awq else []
    recipe.append(QuantizationModifier(targets=["Linear"], ignore=["lm_head", "re:.*o_proj$"], scheme="NVFP4A16"))
    batches: Any = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in tokens]
    # Token ids need no processor, but oneshot would look for one.
    oneshot(model=model, dataset=DataLoader(batches, batch_size=None), recipe=recipe, processor=object())
    found = {name: value.detach().float() for name, value in model.state_dict().items()}
    for name, module in model.named_modules():
        if hasattr(module, "quantization_scheme"):
            found[f"{name}.rounded"] = rounded(module)
    return found


def rounded(module: Any) -> torch.Tensor:
    """A linear's weight through compressed-tensors' own fake quantization, float32 ``[out, in]``."""
    from compressed_tensors.quantization import forward_quantize

    values: torch.Tensor = forward_quantize(module, module.weight, "weight", module.quantization_scheme.weights)
    return values.detach().float()


def effective(found: dict[str, torch.Tensor], wide: Checkpoint, layer: str, group: str) -> torch.Tensor:
    """What the linears of a group do to the inputs of the wide model, all folds undone: float32 ``[out, in]``."""
    parts = []
    for part in GROUPS[group]:
        values = found[f"{layer}.{part}.rounded"]
        if group == "down":
            # The factors of down's inputs are in the rows of up.
            parts.append(values * rows_of_up(found, wide, layer))
            continue
        norm = f"{layer}.{'input_layernorm' if group == 'q/k/v' else 'post_attention_layernorm'}.weight"
        values = values * (found[norm] / wide.load(norm).float())
        parts.append(values / rows_of_up(found, wide, layer)[:, None] if part == "mlp.up_proj" else values)
    return torch.cat(parts)


def rows_of_up(found: dict[str, torch.Tensor], wide: Checkpoint, layer: str) -> torch.Tensor:
    """What AWQ multiplied the rows of the up projection by, float32 ``[inner]``."""
    norm = f"{layer}.post_attention_layernorm.weight"
    before = wide.load(f"{layer}.mlp.up_proj.weight").float()
    # Columns of up were multiplied by what the norm was divided by.
    columns = wide.load(norm).float() / found[norm]
    now = found[f"{layer}.mlp.up_proj.weight"] / columns
    ratio = (now * before).sum(dim=1) / before.square().sum(dim=1)
    if not torch.allclose(now, before * ratio[:, None], rtol=1e-4, atol=1e-7):
        raise RuntimeError(f"{layer}.mlp.up_proj: is not the wide weight with scaled rows and columns")
    return ratio


def check(arguments: list[str]) -> int:
    """Runs the check on `[FOLDER]`; returns the number of failures."""
    if len(arguments) != 1:
        raise Usage("usage: check_awq_llm_compressor.py FOLDER")
    exported, failures = Exported(Path(arguments[0])), 0
    wide = Checkpoint(exported.folder / "llama")
    with TemporaryDirectory() as scratch:
        # It writes a log where it stands.
        before = Path.cwd()
        os.chdir(scratch)
        folder = (before / exported.folder / "llama").resolve()
        plain = quantize(folder, exported.tokens, awq=False)
        made = quantize(folder, exported.tokens, awq=True)
        os.chdir(before)
    for layer in exported.layers():
        for group in GROUPS:
            theirs = {"plain": effective(plain, wide, layer, group), "lite": effective(made, wide, layer, group)}
            failures += compare(exported, layer, group, "llm-compressor", theirs)
    return failures


if __name__ == "__main__":
    import sys

    run(check, sys.argv[1:])
