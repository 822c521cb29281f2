"""Whether weights, KV cache and activations fit: exact where headers and config tell, an estimate with its rule elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from omnifp4.doctor.facts import SPEECH, TEXT, TOWERS, Facts
from omnifp4.receipt.doctor import Fit, FitRow, Machine, TierRow

BF16: Final = 2
BATCHES: Final = (1, 4, 16)
SPEECH_FRAMES: Final = 4096
"""Audio frames a turn may have: ``talker_max_new_tokens`` of Transformers."""
WEIGHT_ROOM: Final = 1.05
"""Allocators round up, and quantized layers keep a few scales apart."""
GPU_ROOM_BYTES: Final = 800_000_000
"""CUDA context and kernels' work space."""
CPU_ROOM_BYTES: Final = 1_000_000_000
"""Interpreter, torch and Transformers."""
LEAST_TOKENS: Final = 1024
"""A context with which one can talk."""
TIER_TOKENS: Final = 4096
DEVICE_SIZES_GB: Final = (8, 12, 16, 24, 32, 48, 64, 80, 96, 128, 141, 192)
TIERS: Final = ((17.0, "optimal: about 16 GiB"), (20.0, "target: under 20 GiB"), (30.0, "minimum viable: under 30 GiB"))


def gb(count: int) -> str:
    """Decimal gigabytes, or megabytes where they are less than one."""
    return f"{count / 1e9:,.3g} GB" if count >= 10**9 else f"{count / 1e6:,.3g} MB"


@dataclass(frozen=True, slots=True)
class Decoder:
    """Sizes of a decoder that decide about memory; 0 where the config does not tell."""

    layers: int
    width: int
    key_heads: int
    head_width: int
    vocabulary: int
    experts_per_token: int
    inner_width: int
    context: int

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of all layers, in BF16."""
        return 2 * self.layers * self.key_heads * self.head_width * BF16

    @property
    def prefill_bytes_per_token(self) -> int:
        """Logits of every prompt position, states of a layer, and the inner states of its active experts."""
        active = max(1, self.experts_per_token)
        return BF16 * (self.vocabulary + 12 * self.width + active * (3 * self.inner_width + 2 * self.width))

    @property
    def states_bytes_per_token(self) -> int:
        """The states after every layer, which are kept for the talker."""
        return BF16 * (self.layers + 1) * self.width


def read_sizes(config: Mapping[str, Any]) -> tuple[Decoder | None, Decoder | None]:
    """The text decoder's sizes, and the talker's."""
    thinker = _section(config, "thinker_config") or config
    text = _decoder(_section(thinker, "text_config") or thinker)
    talker = _section(config, "talker_config")
    return text, _decoder(_section(talker, "text_config") or talker) if talker else None


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = config.get(name)
    return value if isinstance(value, dict) else {}


def _decoder(section: Mapping[str, Any]) -> Decoder | None:
    def size(key: str, default: int = 0) -> int:
        value = section.get(key)
        return value if isinstance(value, int) and value > 0 else default

    heads, width = size("num_attention_heads"), size("hidden_size")
    if not (size("num_hidden_layers") and heads and width):
        return None
    sparse = bool(size("num_experts") or size("num_local_experts"))
    return Decoder(
        layers=size("num_hidden_layers"),
        width=width,
        key_heads=size("num_key_value_heads", heads),
        head_width=size("head_dim", width // heads),
        vocabulary=size("vocab_size"),
        experts_per_token=size("num_experts_per_tok") if sparse else 0,
        inner_width=size("moe_intermediate_size") if sparse else size("intermediate_size"),
        context=size("max_position_embeddings"),
    )


@dataclass(frozen=True, slots=True)
class Load:
    """A set of parts in memory, and what a sequence costs then."""

    name: str
    weight_bytes: int
    bytes_per_token: int
    bytes_per_sequence: int

    def fixed_bytes(self, room: int) -> int:
        """Before the first token."""
        return int(self.weight_bytes * WEIGHT_ROOM) + room

    def needed_bytes(self, room: int, batch: int, tokens: int) -> int:
        """With `tokens` of context in each of `batch` sequences."""
        return self.fixed_bytes(room) + batch * (self.bytes_per_sequence + tokens * self.bytes_per_token)

    def most_tokens(self, device_bytes: int, room: int, batch: int, limit: int) -> int:
        """The longest context that fits, at most `limit` if that is not 0."""
        left = device_bytes - self.fixed_bytes(room) - batch * self.bytes_per_sequence
        tokens = max(0, left // (batch * max(1, self.bytes_per_token)))
        return min(tokens, limit) if limit else tokens


def list_loads(facts: Facts) -> list[Load]:
    """Text alone, all that listens and sees, and speech too; as far as the checkpoint has them."""
    text, talker = read_sizes(facts.config)
    if text is None:
        return []
    parts = facts.parts
    thinking = text.kv_bytes_per_token + text.prefill_bytes_per_token
    loads = [Load(TEXT, parts.get(TEXT, 0), thinking, 0)]
    if TOWERS in parts:
        loads.append(Load(f"{TEXT} + {TOWERS}", parts.get(TEXT, 0) + parts[TOWERS], thinking, 0))
    if SPEECH in parts and talker is not None:
        speaking = thinking + text.states_bytes_per_token + talker.kv_bytes_per_token
        frames = SPEECH_FRAMES * talker.kv_bytes_per_token
        loads.append(Load(f"all parts, with {SPEECH}", sum(parts.values()), speaking, frames))
    return loads


def devices_of(machine: Machine, device_memory: int | None) -> list[tuple[str, int, int]]:
    """Name, bytes to count on, and room to leave, of each device; `device_memory` stands for a GPU one asks about."""
    devices = [("RAM", machine.ram_free_bytes, CPU_ROOM_BYTES)]
    if device_memory is not None:
        return [(f"a GPU of {device_memory / 1e9:.4g} GB", device_memory, GPU_ROOM_BYTES), *devices]
    usable = () if machine.torch_problem else machine.accelerators[:1]
    gpus = [
        (gpu.name, gpu.memory_bytes if gpu.free_bytes is None else gpu.free_bytes, GPU_ROOM_BYTES) for gpu in usable
    ]
    return gpus + devices


def fit_model(facts: Facts, machine: Machine, device_memory: int | None = None) -> Fit | None:
    """What fits where; None where the config does not tell the sizes."""
    text, talker = read_sizes(facts.config)
    loads = list_loads(facts)
    if text is None or not loads:
        return None
    speech = text.states_bytes_per_token + talker.kv_bytes_per_token if talker is not None and facts.speaks else 0
    rows = [
        _row(load, device, batch, text.context) for device in devices_of(machine, device_memory) for load in loads for batch in BATCHES
    ]  # fmt: skip
    return Fit(
        kv_bytes_per_token=text.kv_bytes_per_token,
        speech_bytes_per_token=speech,
        activation_bytes_per_token=text.prefill_bytes_per_token,
        model_context=text.context,
        rule=_rule(text, talker if facts.speaks else None),
        rows=tuple(rows),
        tiers=tuple(_tier(load) for load in loads),
    )


def _row(load: Load, device: tuple[str, int, int], batch: int, context: int) -> FitRow:
    name, size, room = device
    tokens = load.most_tokens(size, room, batch, context)
    return FitRow(
        loaded=load.name,
        device=name,
        device_bytes=size,
        weight_bytes=load.weight_bytes,
        batch=batch,
        most_tokens=tokens,
        needed_bytes=load.needed_bytes(room, batch, tokens) if tokens else load.fixed_bytes(room),
    )


def _tier(load: Load) -> TierRow:
    gib = load.weight_bytes / 2**30
    needed = load.needed_bytes(GPU_ROOM_BYTES, 1, TIER_TOKENS)
    return TierRow(
        loaded=load.name,
        weight_bytes=load.weight_bytes,
        tier=next((name for most, name in TIERS if gib < most), "over 30 GiB"),
        smallest_device_gb=next((size for size in DEVICE_SIZES_GB if size * 10**9 >= needed), 0),
    )


def _rule(text: Decoder, talker: Decoder | None) -> tuple[str, ...]:
    lines = [
        f"weights: bytes in the headers, + {WEIGHT_ROOM - 1:.0%}; {GPU_ROOM_BYTES / 1e9} GB for CUDA, {CPU_ROOM_BYTES / 1e9} GB on a CPU",
        f"KV cache: 2 x {text.layers} layers x {text.key_heads} heads x {text.head_width} x 2 bytes = "
        f"{text.kv_bytes_per_token:,} bytes a token (BF16)",
        f"activations (estimate): the whole prompt at once, {text.prefill_bytes_per_token:,} bytes a token: logits of "
        f"{text.vocabulary:,} words at every position, 12 states of {text.width:,}, and "
        f"{max(1, text.experts_per_token)} x (3 x {text.inner_width:,} + 2 x {text.width:,}) inside the MLP, 2 bytes each; "
        "long sounds and pictures come on top",
    ]
    if talker is not None:
        lines.append(
            f"speech: {text.states_bytes_per_token:,} bytes a token of thinker states kept for the talker, its own cache of "
            f"{talker.kv_bytes_per_token:,} a token, and {SPEECH_FRAMES:,} audio frames a turn"
        )
    return tuple(lines)


def best_row(fit: Fit | None, device: str, *, speech: bool) -> FitRow | None:
    """The row for one sequence on a device: of all parts if `speech`, else of the smallest set with all but speech."""
    rows = [row for row in fit.rows if row.device == device and row.batch == 1] if fit is not None else []
    if not speech:
        rows = [row for row in rows if SPEECH not in row.loaded]
    return rows[-1] if rows else None
