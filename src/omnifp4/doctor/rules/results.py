"""What came back from ``generate`` was taken for something else."""

from __future__ import annotations

import re
from collections.abc import Iterator

from omnifp4.doctor.evidence import Evidence
from omnifp4.doctor.rules.base import note, problem, told
from omnifp4.receipt.diagnosis import Explanation

TAKEN_WRONG = (
    r"'(Tensor|tuple|list|GenerateDecoderOnlyOutput)' object has no attribute '(sequences|shape|tolist|logits)'|"
    r"not enough values to unpack \(expected 2, got 1\)|too many values to unpack \(expected 2|"
    r"(tuple|list) indices must be integers or slices, not tuple|"
    r"argument 'ids': 'tuple' object|unhashable type: 'slice'|int\(\) argument must be .* not '(tuple|list)'"
)

RESULT_FIX = (
    "result = model.generate(**inputs, return_audio=False)       # a tensor [batch, prompt + answer]\n"
    "sequences, wav = model.generate(**inputs)                   # with speech: a tuple, wav [1, 1, samples] at 24 kHz\n"
    "# with thinker_return_dict_in_generate=True and no speech: an object with .sequences\n"
    'answer = processor.batch_decode(sequences[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)'
)


def wrong_type(evidence: Evidence) -> Iterator[Explanation]:
    """Tuple against tensor."""
    for thrown in evidence.find(TAKEN_WRONG):
        made = next((record for record in reversed(evidence.generates) if record.result), None)
        if made is None or thrown.phase not in ("script", "thread"):
            continue
        speech = made.arguments.get("return_audio", "with speech")
        yield problem(
            "generate.result",
            f"generate returned a {made.result}, and was taken for something else",
            "an omni model's generate returns a tensor without speech, a tuple (sequences, waveform) with it, and an object "
            "with .sequences if thinker_return_dict_in_generate=True and there is no speech",
            [*told(thrown), f"{made.model}.generate, return_audio: {speech}, returned {made.result}"],
            RESULT_FIX,
        )
        return
    for thrown in evidence.printed(r"'(Tensor|tuple)' object has no attribute 'sequences'"):
        yield problem(
            "generate.result",
            "what generate returned was taken for something else",
            "an omni model's generate returns a tensor, a tuple or an object, depending on its arguments",
            told(thrown),
            RESULT_FIX,
        )


def tokens_ignored(evidence: Evidence) -> Iterator[Explanation]:
    """``max_new_tokens`` of an omni model is dropped in silence."""
    for record in evidence.generates:
        if (
            record.model.startswith(("Qwen3OmniMoeFor", "Qwen2_5OmniFor"))
            and "max_new_tokens" in record.arguments
            and "thinker_max_new_tokens" not in record.arguments
        ):
            yield note(
                "generate.max-new-tokens",
                "max_new_tokens has no effect on an omni model",
                "its generate hands on only what begins with thinker_ or talker_, and has 1,024 of its own",
                [f"max_new_tokens={record.arguments['max_new_tokens']}"],
                f"thinker_max_new_tokens={record.arguments['max_new_tokens']}",
            )
            return


def no_talker(evidence: Evidence) -> Iterator[Explanation]:
    """Speech was asked of a model that has no talker any more."""
    for thrown in evidence.seen(r"Cannot use talker when talker module not initialized"):
        yield problem(
            "speech.no-talker",
            "speech was asked of a model without a talker",
            "disable_talker() was called"
            if evidence.talker_disabled
            else "the checkpoint was loaded without its talker",
            told(thrown),
            "generate with return_audio=False, or load the model without disabling its talker",
        )
        return


def unknown_speaker(evidence: Evidence) -> Iterator[Explanation]:
    """A voice that the checkpoint does not have."""
    for thrown in evidence.seen(r"Speaker .{1,60} not implemented"):
        known = [
            name
            for _, facts in evidence.loaded()
            for name in (facts.config.get("talker_config") or {}).get("speaker_id", {})
        ]
        asked = re.search(r"Speaker (.{1,60}) not implemented", thrown.whole)
        yield problem(
            "speech.speaker",
            f"there is no speaker {asked.group(1) if asked else ''!r}",
            "the voices are those of the checkpoint's talker_config.speaker_id",
            told(thrown),
            f"one of: {', '.join(known) or 'Ethan, Chelsie, Aiden'}",
        )
        return


RULES = (wrong_type, tokens_ignored, no_talker, unknown_speaker)
