"""How a checkpoint is about to be misused: its dtype, its prompt format, its speech, its size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from omnifp4.checkpoint.folder import read_json
from omnifp4.doctor.facts import Facts, Kind
from omnifp4.errors import OmniFP4Error
from omnifp4.receipt.doctor import Concern, Severity

CHATML: Final = ("<|im_start|>", "<|im_end|>")
ROLES: Final = ("system", "user", "assistant")
CHATML_TYPES: Final = ("qwen3_omni_moe", "qwen3_omni_moe_thinker", "qwen2_5_omni", "qwen3_vl_moe", "qwen3_moe", "qwen3")
TEMPLATES: Final = ("chat_template.jinja", "chat_template.json")
COPY: Final = "copy it from the original checkpoint"


def find_misuse(facts: Facts) -> tuple[Concern, ...]:
    """Every concern, problems first."""
    found = [*_dtype(facts), *_speech(facts), *_nothing_quantized(facts)]
    if facts.folder is not None:
        found += [*_template(facts, facts.folder), *_tokenizer(facts, facts.folder), *_processor(facts, facts.folder)]
    return tuple(sorted(found, key=lambda concern: concern.severity is not Severity.PROBLEM))


def _problem(name: str, finding: str, fix: str) -> Concern:
    return Concern(name=name, severity=Severity.PROBLEM, finding=finding, fix=fix)


def _note(name: str, finding: str, fix: str = "") -> Concern:
    return Concern(name=name, severity=Severity.NOTE, finding=finding, fix=fix)


def dtypes_of(config: Mapping[str, Any]) -> dict[str, str]:
    """Every dtype that a config states, by its place."""
    found: dict[str, str] = {}
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and isinstance(value, str):
            found[key] = value.removeprefix("torch.")
        elif isinstance(value, dict) and key != "quantization_config":
            found |= {f"{key}.{place}": dtype for place, dtype in dtypes_of(value).items()}
    return found


def _dtype(facts: Facts) -> Iterator[Concern]:
    narrow = {place: dtype for place, dtype in dtypes_of(facts.config).items() if dtype in ("float16", "half")}
    if narrow and facts.kind in (Kind.NVFP4, Kind.OTHER, Kind.CLAIM_ONLY):
        place, dtype = next(iter(narrow.items()))
        yield _problem(
            "config.dtype",
            f"config.json says {place} {dtype}, but the weights are quantized: dtype='auto' would cast all that stays "
            "wide to float16, which overflows and, on some loaders, converts every tensor without end",
            f'set "{place}" to "bfloat16" in config.json, and load with dtype="auto"',
        )


def _speech(facts: Facts) -> Iterator[Concern]:
    if facts.speech_is_random:
        yield _problem(
            "config.speech",
            "enable_audio_output is true, but there are no talker weights: a loader makes a talker of random weights "
            "(this is what disable_talker() and then save_pretrained() leave behind)",
            'set "enable_audio_output" to false in config.json, or: omnifp4 repair IN OUT',
        )
    elif facts.is_omni and facts.speaks and facts.config.get("enable_audio_output", True) is not True:
        yield _note(
            "config.speech",
            "there are talker weights, but enable_audio_output is false: they are not loaded",
            'set "enable_audio_output" to true in config.json if it shall speak',
        )


def _nothing_quantized(facts: Facts) -> Iterator[Concern]:
    requantize = "omnifp4 quantize ORIGINAL OUT writes real FP4; omnifp4 verify OUT proves it"
    if facts.kind is Kind.AMAX_ONLY:
        count = len(facts.statistics) or len(facts.linears)
        yield _problem(
            "weights.not-packed",
            f"1.00x: the weights are wide, with {count:,} calibration values beside them; these compress nothing, in no "
            "engine: vLLM does not read them, Transformers ignores them",
            requantize,
        )
    elif facts.kind is Kind.CLAIM_ONLY:
        yield _problem(
            "weights.not-packed", "1.00x: the config claims a quantization, but no tensor is FP4", requantize
        )
    elif facts.kind is Kind.FAKE_QUANT:
        yield _note(
            "weights.fake-quant",
            "1.00x: a fake-quant checkpoint, wide weights rounded through NVFP4; it is for quality checks",
            requantize,
        )


def _template(facts: Facts, folder: Path) -> Iterator[Concern]:
    if facts.model_type not in CHATML_TYPES or any((folder / name).is_file() for name in TEMPLATES):
        return
    settings = _json(folder / "tokenizer_config.json")
    if not settings.get("chat_template"):
        yield _problem(
            "files.chat-template",
            "there is no chat template (chat_template.jinja): apply_chat_template fails, and a plain prompt has no roles"
            + (", on which the talker crashes" if facts.is_omni and facts.speaks else ""),
            f"chat_template.jinja: {COPY}",
        )


def _tokenizer(facts: Facts, folder: Path) -> Iterator[Concern]:
    if facts.model_type not in CHATML_TYPES:
        return
    ids = token_ids(folder)
    if not ids:
        yield _problem("files.tokenizer", "there is no tokenizer (tokenizer.json, or vocab.json)", f"{COPY}")
        return
    missing = [token for token in CHATML if token not in ids]
    if missing:
        yield _problem(
            "files.tokenizer",
            f"the tokenizer does not know {' and '.join(missing)}: ChatML markers become ordinary text, and no role is found",
            f"tokenizer files: {COPY}",
        )
        return
    names = {"im_start_token_id": CHATML[0], "im_end_token_id": CHATML[1], **{f"{r}_token_id": r for r in ROLES}}
    for key, token in names.items():
        stated, own = facts.config.get(key), ids.get(token)
        if isinstance(stated, int) and own is not None and stated != own:
            yield _problem(
                "files.tokenizer",
                f"config.json says {key} {stated}, but the tokenizer gives {token!r} the id {own}: roles are not found",
                "tokenizer files and config.json must come from the same checkpoint",
            )
            return


def _processor(facts: Facts, folder: Path) -> Iterator[Concern]:
    if facts.is_omni and not any((folder / n).is_file() for n in ("preprocessor_config.json", "processor_config.json")):
        yield _problem(
            "files.processor",
            "there is no preprocessor_config.json: Qwen3OmniMoeProcessor cannot be built, so no sound or picture goes in",
            f"preprocessor_config.json and video_preprocessor_config.json: {COPY}",
        )


def token_ids(folder: Path) -> dict[str, int]:
    """Ids of the ChatML markers and roles in a folder's tokenizer, as far as they are found."""
    wanted = {*CHATML, *ROLES}
    found: dict[str, int] = {}
    whole = _json(folder / "tokenizer.json")
    model = whole.get("model")
    vocabularies: list[Any] = [model.get("vocab") if isinstance(model, dict) else None, _json(folder / "vocab.json")]
    for vocabulary in vocabularies:
        if isinstance(vocabulary, dict):
            found |= {token: vocabulary[token] for token in wanted & vocabulary.keys()}
    for added in whole.get("added_tokens") or ():
        if isinstance(added, dict) and added.get("content") in wanted:
            found[added["content"]] = added.get("id", -1)
    decoder = _json(folder / "tokenizer_config.json").get("added_tokens_decoder")
    for number, added in (decoder or {}).items() if isinstance(decoder, dict) else ():
        if isinstance(added, dict) and added.get("content") in wanted and str(number).isdigit():
            found[added["content"]] = int(number)
    for token, number in _json(folder / "added_tokens.json").items():
        if token in wanted:
            found[token] = number
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path) if path.is_file() else {}
    except OmniFP4Error:
        return {}
    return value if isinstance(value, dict) else {}
