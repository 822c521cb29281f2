"""Writes a small Llama and what our AWQ makes of its linears, for ModelOpt and llm-compressor to judge.

    python export_awq.py FOLDER

Runs in this project's environment. FOLDER gets ``llama/``, a checkpoint whose weights have heavy tails and whose channels
are of unlike energy, ``tokens.safetensors``, the sequences that calibrate it, and ``awq.safetensors``:

- ``inputs.MODULE``, ``[tokens, in]``: of each of the first of the linears that read one input, before any rounding;
- ``WAY.MODULE``, ``[out, in]``: what each rounded linear then does to those inputs, all folds undone.

The ways are the recipes as they are (``lite``, ``full``), the same under max scaling, which is the peers' rule (``lite-max``,
``full-max``), and ``unbound-max``: the peers' factors, which are no powers of two, under our arithmetic.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from omnifp4.algorithms.awq import column_sizes
from omnifp4.algorithms.errors import diagonal_blocks, error_of
from omnifp4.algorithms.grid import decode, encode, max_block_scales, tensor_scales
from omnifp4.calibration.statistics import InputStatistics, Source
from omnifp4.checkpoint.folder import open_checkpoint
from omnifp4.checkpoint.folds import Folds, scaled
from omnifp4.checkpoint.reader import CheckpointReader
from omnifp4.formats.nvfp4 import Float32Array, ScaleRule
from omnifp4.formats.widening import widen
from omnifp4.models.source import match_source
from omnifp4.quantization.decisions import Job, decide
from omnifp4.quantization.folding import find_fold, fold_places
from omnifp4.quantization.recipe import find_recipe
from omnifp4.quantization.rounding import Subject, round_group

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 256, "intermediate_size": 512,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 512,
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e4, "max_position_embeddings": 256,
    "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "dtype": "bfloat16",
}  # fmt: skip
SEQUENCES, LENGTH = 12, 96
WAYS = {
    "lite": ("nvfp4-awq-lite", None),
    "full": ("nvfp4-awq-full", None),
    "lite-max": ("nvfp4-awq-lite", ScaleRule.MAX),
    "full-max": ("nvfp4-awq-full", ScaleRule.MAX),
}
"""Recipe, and the scale rule if it is not the recipe's."""


class SeenInputs:
    """Inputs of linears that were kept whole; see `omnifp4.quantization.inputs.KnownInputs`."""

    device = torch.device("cpu")

    def __init__(self, inputs: Mapping[str, Tensor]) -> None:
        self._inputs = inputs
        self._hessians = {id(x): x.mT @ x / len(x) for x in inputs.values()}

    def source(self, weight_name: str) -> Source:
        """Every linear saw every token."""
        return "routed" if weight_name in self._inputs else "none"

    def tokens(self, weight_name: str) -> int:
        """All of them."""
        return len(self._inputs[weight_name])

    def bank(self, weight_name: str) -> str:
        """The first of the weights that read the same tensor."""
        return next(name for name, x in self._inputs.items() if x is self._inputs[weight_name])

    def statistics(self, weight_name: str) -> InputStatistics:
        """Means over the tokens."""
        x, hessian = self._inputs[weight_name], self.hessian(weight_name)
        means = x.abs().mean(dim=0), x.square().mean(dim=0)
        return InputStatistics(len(x), x.abs().max(), *means, diagonal_blocks(hessian))

    def hessian(self, weight_name: str) -> Tensor:
        """``E[x x']``."""
        return self._hessians[id(self._inputs[weight_name])]

    def learned(self, weight_name: str) -> None:
        """Nothing was learned."""


def write_model(folder: Path) -> None:
    """A Llama whose linears have Student t weights with five degrees of freedom, and columns of unlike size."""
    generator = torch.Generator().manual_seed(6)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    hidden, inner, vocabulary = (int(str(CONFIG[k])) for k in ("hidden_size", "intermediate_size", "vocab_size"))
    mix = normal(hidden, hidden) * torch.arange(1, hidden + 1)[:, None] ** -0.5
    embedding = (normal(vocabulary, hidden) @ mix + 0.5 * normal(vocabulary, hidden)) * (0.7 * normal(hidden)).exp()
    tensors = {"model.embed_tokens.weight": embedding, "model.norm.weight": torch.ones(hidden)}
    tensors["lm_head.weight"] = 0.02 * normal(vocabulary, hidden)
    for layer in range(int(str(CONFIG["num_hidden_layers"]))):
        place = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{place}.{norm}.weight"] = (0.5 * normal(hidden)).exp()
        parts = {f"self_attn.{part}_proj": (hidden, hidden) for part in "qkvo"}
        parts |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
        for part, (rows, columns) in parts.items():
            tails = normal(5, rows, columns).square().mean(dim=0).sqrt()
            weight = columns**-0.5 * normal(rows, columns) / tails
            tensors[f"{place}.{part}.weight"] = weight * (0.3 * normal(columns)).exp()
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2))
    save_file(
        {k: v.bfloat16().contiguous() for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )


def watch(folder: Path, tokens: Tensor) -> dict[str, Tensor]:
    """Inputs of every linear of the layers, float32 ``[tokens, in]`` by weight name; one tensor for those that share it."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":

            def keep(_: object, inputs: tuple[Tensor], key: str = f"{name}.weight") -> None:
                # q, k and v, and gate and up, are handed the very same tensor.
                found[key] = inputs[0]

            module.register_forward_pre_hook(keep)
    model(tokens)
    flat = {id(x): x.reshape(-1, x.shape[-1]).contiguous() for x in found.values()}
    return {name: flat[id(x)] for name, x in found.items()}


def round_model(job: Job, inputs: SeenInputs) -> dict[str, Tensor]:
    """Every linear through the recipe, folds undone: float32 ``[out, in]`` by weight name."""
    made: dict[str, Tensor] = {}
    with CheckpointReader(job.source.checkpoint) as reader:
        folds, places = Folds(), [place for found in fold_places(job.decisions).values() for place in found]
        for place in places:
            fold = find_fold(place, reader, inputs, job.recipe, job.rule)
            if fold is not None:
                folds.add(fold)

        def subject(name: str, wide: Float32Array) -> Subject:
            columns, rows = (
                None if part is None else np.exp2(part.astype(np.float32))
                for part in (folds.columns(name), folds.outputs(name))
            )
            return Subject(name, scaled(wide, folds.exponents(name, wide.shape)), columns, rows)

        for group in (group for place in places for group in place.rounded):
            subjects = [subject(t.spec.name, widen(t.read(reader), t.entry.dtype)) for t in group]
            _, rounded = round_group(subjects, job.recipe, job.rule, inputs)
            for one, done in zip(subjects, rounded, strict=True):
                values = done.values if one.columns is None else done.values / torch.from_numpy(one.columns)
                made[one.name] = values if one.rows is None else values * torch.from_numpy(one.rows)[:, None]
    return made


def round_unbound(weight: Tensor, inputs: Tensor) -> Tensor:
    """AWQ under max scaling with the peers' factors ``E|x|**a / |w|**(1 - a)``, `weight` being all that reads the inputs."""
    size = column_sizes(weight)
    hessian, best = inputs.mT @ inputs / len(inputs), (torch.inf, weight)
    for step in range(11):
        exponent = step / 10 * inputs.abs().mean(dim=0).log2() - (1 - step / 10) * size.log2()
        factors = (exponent - (exponent.max() + exponent.min()) / 2).exp2()
        scale = tensor_scales((weight * factors).abs().max(), ScaleRule.MAX)
        rounded = decode(encode(weight * factors, max_block_scales(weight * factors, scale), scale)) / factors
        best = min(best, (float(error_of(rounded - weight, hessian)), rounded), key=lambda pair: pair[0])
    return best[1]


def main() -> None:
    torch.set_grad_enabled(False)
    home = Path(sys.argv[1])
    write_model(home / "llama")
    shape = (SEQUENCES, LENGTH)
    tokens = torch.randint(0, 512, shape, generator=torch.Generator().manual_seed(7))
    save_file({"tokens": tokens}, home / "tokens.safetensors")
    seen = watch(home / "llama", tokens)
    inputs, source = SeenInputs(seen), match_source(open_checkpoint(home / "llama"))
    tensors = {
        f"inputs.{name.removesuffix('.weight')}": x
        for name, x in seen.items()
        if name.endswith(("q_proj.weight", "gate_proj.weight", "down_proj.weight"))
    }
    for way, (recipe, rule) in WAYS.items():
        made = round_model(decide(source, find_recipe(recipe), rule=rule), inputs)
        tensors |= {f"{way}.{name.removesuffix('.weight')}": value for name, value in made.items()}
    with CheckpointReader(source.checkpoint) as reader:
        wide = {
            t.spec.name: torch.from_numpy(widen(t.read(reader), t.entry.dtype))
            for t in source.tensors
            if t.spec.name in made
        }
    for members in {id(seen[name]): [n for n in made if seen[n] is seen[name]] for name in made}.values():
        rounded = round_unbound(torch.cat([wide[name] for name in members]), seen[members[0]])
        begin = 0
        for name in members:
            tensors[f"unbound-max.{name.removesuffix('.weight')}"] = rounded[begin : (begin := begin + len(wide[name]))]
    save_file({key: value.contiguous() for key, value in tensors.items()}, home / "awq.safetensors")


if __name__ == "__main__":
    main()
