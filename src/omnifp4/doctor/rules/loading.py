"""Loads that fail, or succeed and give another model than the one that was meant."""

from __future__ import annotations

from collections.abc import Iterator

from omnifp4.doctor.evidence import Evidence
from omnifp4.doctor.facts import Kind
from omnifp4.doctor.rules.base import note, problem, told
from omnifp4.receipt.diagnosis import Explanation, LoadRecord

OMNI_CLASS_FIX = (
    "from transformers import Qwen3OmniMoeForConditionalGeneration, Qwen3OmniMoeProcessor\n"
    'model = Qwen3OmniMoeForConditionalGeneration.from_pretrained(path, dtype="auto")'
)
PACKED_FIX = (
    "import omnifp4   # registers with Transformers: NVFP4 then loads packed\n"
    'model = Qwen3OmniMoeForConditionalGeneration.from_pretrained(path, dtype="auto")   # or omnifp4.load(path)'
)


def wrong_class(evidence: Evidence) -> Iterator[Explanation]:
    """An Auto class that has no omni models."""
    for thrown in evidence.seen(r"Unrecognized configuration class .{0,200} for this kind of AutoModel"):
        text = thrown.text.partition(" Model type should be one of")[0]
        name = thrown.subject or "AutoModelForCausalLM"
        yield problem(
            "load.wrong-class",
            f"{name} has no omni models",
            "an omni model hears, sees and speaks: it is no causal language model, and has a class of its own",
            [text[:300], *told(thrown)[1:]],
            OMNI_CLASS_FIX,
        )
        return


def _asked_dtype(load: LoadRecord) -> str:
    return load.arguments.get("dtype", load.arguments.get("torch_dtype", "")).strip("'").removeprefix("torch.")


def wrong_dtype(evidence: Evidence) -> Iterator[Explanation]:
    """float16 asked of a quantized checkpoint."""
    for load, facts in evidence.loaded():
        dtype = _asked_dtype(load)
        if facts.kind in (Kind.NVFP4, Kind.OTHER, Kind.CLAIM_ONLY) and dtype in ("float16", "half"):
            yield problem(
                "load.dtype",
                f"dtype {dtype} was asked of a checkpoint that is quantized",
                "its weights are no float16 and shall not be made so: what is wide in it is BF16 and overflows as float16, and "
                "some loaders convert every tensor, without end and without a word",
                [
                    f"{load.loader}.from_pretrained({load.path!r}, dtype={dtype})",
                    f"config.json: quant_method {facts.dialect or 'unknown'}",
                    "the load had not ended" if load.seconds is None else f"the load took {load.seconds:.1f} s",
                ],
                'from_pretrained(path, dtype="auto")',
            )
            return


def packed_without_omnifp4(evidence: Evidence) -> Iterator[Explanation]:
    """An NVFP4 checkpoint, and Transformers alone."""
    for load, facts in evidence.loaded():
        if facts.kind is not Kind.NVFP4 or evidence.has_omnifp4:
            continue
        what = f"{load.path}: {facts.dialect or 'no quantization_config'}, {len(facts.fp4):,} linears in FP4"
        thrown = evidence.find(r"size mismatch|ignore_mismatched_sizes|compressed-tensors.{0,40}is required", "load")
        if thrown:
            yield problem(
                "load.nvfp4-without-omnifp4",
                "Transformers alone cannot load this NVFP4 checkpoint",
                "two codes lie in a byte, so the stored weights have half the columns: "
                + (
                    "Transformers has no quantizer for ModelOpt, takes them for BF16, and finds sizes that do not match"
                    if facts.dialect == "modelopt"
                    else "Transformers would hand it to another library, which loses the experts' tensor scales in silence"
                ),
                [what, *told(thrown[0])],
                PACKED_FIX,
            )
            return
        if facts.has_experts and not load.error and load.seconds is not None:
            yield problem(
                "load.scales-lost",
                "an NVFP4 checkpoint was loaded without omnifp4: its experts are wrong, in silence",
                "Transformers 5.23 fuses the experts and drops their tensor scales: weights are off by up to 2688 times",
                [what],
                PACKED_FIX,
            )
            return


def not_packed(evidence: Evidence) -> Iterator[Explanation]:
    """A checkpoint that was meant to be FP4, and is as large as before."""
    paths = [load.path for load, _ in evidence.loaded()] + evidence.saved
    paths += [engine["path"] for engine in evidence.vllm]
    for path in dict.fromkeys(paths):
        facts = evidence.facts(path)
        if facts is None or facts.kind not in (Kind.AMAX_ONLY, Kind.CLAIM_ONLY):
            continue
        count = len(facts.statistics) or len(facts.linears)
        saved = path in evidence.saved
        yield problem(
            "weights.not-packed",
            f"1.00x: what was {'saved' if saved else 'loaded'} as quantized is not",
            "the weights are wide, with calibration values (_amax) beside them. That is not FP4 made at load: no engine makes "
            "FP4 of them, vLLM does not read them, Transformers ignores them, so neither disk nor memory is saved",
            [
                f"{path}: {facts.checkpoint.weight_bytes / 1e9:.3g} GB, {len(facts.fp4):,} FP4 linears, {count:,} calibration values",
                *(p.message for p in evidence.printed(r"compression ratio|1\.00x")),
            ],
            "omnifp4 quantize ORIGINAL OUT\nomnifp4 verify OUT --against ORIGINAL   # proves that it shrank",
        )
        return


def random_talker(evidence: Evidence) -> Iterator[Explanation]:
    """A talker of random weights, loaded or left behind."""
    for load, facts in evidence.loaded():
        if facts.speech_is_random and not load.error and "config" not in load.arguments:
            yield problem(
                "load.random-talker",
                "the talker that was loaded has random weights",
                "config.json says enable_audio_output, but there are no talker weights, so they were made up: this is what "
                "disable_talker() and then save_pretrained() leave behind",
                [load.path],
                'set "enable_audio_output" to false in its config.json, or: omnifp4 repair IN OUT',
            )
            return
    for folder in evidence.saved:
        facts_saved = evidence.facts(folder)
        if facts_saved is not None and facts_saved.speech_is_random:
            yield problem(
                "save.random-talker",
                "the saved model will get a random talker when it is loaded",
                "disable_talker() takes the talker away but leaves enable_audio_output true in the config",
                [folder],
                "model.config.enable_audio_output = False before save_pretrained; omnifp4.load(path, speech=False) does it",
            )
            return


def unfinished_transformers(evidence: Evidence) -> Iterator[Explanation]:
    """Attributes that early releases lacked."""
    for thrown in evidence.seen(r"has no attribute '(lm_head|initializer_range)'"):
        version = evidence.versions.get("transformers", "")
        yield problem(
            "load.early-transformers",
            "the model is loaded whole, and then its making fails",
            "development versions of Transformers 5.0 lacked lm_head and initializer_range of Qwen3-Omni",
            [*told(thrown), f"transformers {version}" if version else ""],
            "pip install 'transformers>=5.17,<=5.23'",
        )
        return


def old_transformers(evidence: Evidence) -> Iterator[Explanation]:
    """A release that is older than the model."""
    pattern = r"does not recognize this architecture|cannot import name 'Qwen\w*Omni\w*' from 'transformers"
    for thrown in evidence.seen(pattern):
        version = evidence.versions.get("transformers", "")
        yield problem(
            "load.old-transformers",
            "this Transformers does not know the model",
            "the model is younger than the installed release",
            [*told(thrown), f"transformers {version}" if version else ""],
            "pip install 'transformers>=5.17,<=5.23'",
        )
        return


def not_a_checkpoint(evidence: Evidence) -> Iterator[Explanation]:
    """A path that is no checkpoint."""
    pattern = r"is not a local folder and is not a valid model identifier|does not appear to have a file named config|Repo id must be|no file named (model\.safetensors|pytorch_model)"
    for thrown in evidence.find(pattern, "load"):
        yield problem(
            "load.no-checkpoint",
            "what was given to from_pretrained is no checkpoint",
            "a folder with config.json and safetensors, or a Hub id, is needed; a wrong path is taken for a Hub id",
            told(thrown),
            "omnifp4 doctor PATH says what is there",
        )
        return


def slow_note(evidence: Evidence) -> Iterator[Explanation]:
    """Fake-quant checkpoints are for measuring quality."""
    for load, facts in evidence.loaded():
        if facts.kind is Kind.FAKE_QUANT:
            yield note(
                "weights.fake-quant",
                "a fake-quant checkpoint: FP4 values in wide weights",
                "it is for quality checks and saves no memory",
                [load.path],
                "omnifp4 quantize ORIGINAL OUT writes packed weights",
            )
            return


RULES = (
    wrong_class,
    wrong_dtype,
    packed_without_omnifp4,
    not_packed,
    random_talker,
    unfinished_transformers,
    old_transformers,
    not_a_checkpoint,
    slow_note,
)
