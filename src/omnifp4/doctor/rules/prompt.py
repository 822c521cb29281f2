"""Prompts that lack what the model looks for: roles, typed parts, the processor's help."""

from __future__ import annotations

from collections.abc import Iterator

from omnifp4.doctor.evidence import Evidence, Thrown
from omnifp4.doctor.rules.base import note, omni_is_loaded, problem, told
from omnifp4.receipt.diagnosis import Explanation, GenerateRecord

EMPTY_CAT = r"torch\.cat\(\): expected a non-empty list"
NO_ASSISTANT = r"index -1 is out of bounds for dimension 0 with size 0"

MESSAGES_FIX = (
    'messages = [{"role": "user", "content": [{"type": "text", "text": "Hello!"}]}]\n'
    "text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)\n"
    'inputs = processor(text=text, return_tensors="pt", padding=True)'
)


def no_roles(evidence: Evidence) -> Iterator[Explanation]:
    """A prompt without ChatML roles, or without the opening of an answer."""
    thrown = evidence.find(EMPTY_CAT) or evidence.find(NO_ASSISTANT) or evidence.printed(f"{EMPTY_CAT}|{NO_ASSISTANT}")
    if not thrown and evidence.cat.empty:
        thrown = [
            Thrown("cat", "", "torch.cat was given an empty list, which it refuses", frames=(evidence.cat.place,))
        ]
    failed = next((record for record in evidence.generates if record.error), None)
    if thrown and (failed is not None or omni_is_loaded(evidence) or "talker" in " ".join(thrown[0].empty)):
        yield _crash(evidence, thrown[0], failed)
        return
    for record, known in zip(evidence.generates, evidence.roles_known, strict=True):
        if known and record.tokens and not record.roles and not record.error:
            yield note(
                "prompt.no-roles",
                "a prompt without roles was continued, not answered",
                "no <|im_start|> is in the prompt, so the model goes on with the text; with speech the talker would crash",
                [_prompt_line(record)],
                MESSAGES_FIX,
            )
            return


def _crash(evidence: Evidence, thrown: Thrown, record: GenerateRecord | None) -> Explanation:
    roles = record.roles if record is not None else ()
    lines = told(thrown)
    if evidence.cat.empty:
        lines.append(
            f"torch.cat: {evidence.cat.calls:,} calls, {evidence.cat.empty:,} with an empty list, the last at {evidence.cat.place}"
        )
    elif evidence.cat.calls:
        lines.append(f"torch.cat: {evidence.cat.calls:,} calls, none with an empty list")
    lines += [f"empty list: {name}" for name in thrown.empty if "talker" in name]
    if record is not None:
        lines.append(_prompt_line(record))
    if roles and "assistant" not in roles:
        return problem(
            "prompt.no-assistant",
            "the prompt does not open the assistant's answer",
            "the talker looks for the last <|im_start|>assistant in the prompt and finds none: it was made without "
            "add_generation_prompt=True. This is no fault of the weights: the unquantized model fails alike",
            lines,
            MESSAGES_FIX,
        )
    return problem(
        "prompt.no-roles",
        "a plain prompt reached the talker: it has no ChatML roles",
        "the talker takes the conversation apart at <|im_start|> and the role after it, and finds none: up to Transformers "
        "5.14 it then joins an empty list (torch.cat), from 5.19 on it indexes the last assistant turn of none (index -1). "
        "This is no fault of the quantization: the unquantized model fails alike",
        lines,
        MESSAGES_FIX
        + "\n# text alone: model.generate(**inputs, return_audio=False), or omnifp4 chat, which does all this",
    )


def _prompt_line(record: GenerateRecord) -> str:
    roles = ", ".join(record.roles[-8:]) if record.roles else "none"
    return f"last prompt: {record.tokens:,} tokens; role markers seen: {roles}"


def string_content(evidence: Evidence) -> Iterator[Explanation]:
    """A plain string where a list of typed parts is expected."""
    pattern = r"string indices must be integers|'str' object has no attribute '(get|items|keys)'"
    for thrown in evidence.find(pattern):
        whole = " ".join(thrown.frames)
        if any(word in whole for word in ("content", "apply_chat_template", "process_mm_info", "conversation")):
            yield problem(
                "prompt.string-content",
                "a message's content is a plain string",
                "media are looked for part by part, so content must be a list of typed parts; a string is taken letter by letter",
                told(thrown),
                '{"role": "user", "content": [{"type": "text", "text": "Hello!"}]} in place of '
                '{"role": "user", "content": "Hello!"}',
            )
            return


def tokenizer_alone(evidence: Evidence) -> Iterator[Explanation]:
    """AutoTokenizer in place of the processor."""
    if not omni_is_loaded(evidence) or "tokenizer" not in evidence.kinds or "processor" in evidence.kinds:
        return
    load = evidence.loads[evidence.kinds.index("tokenizer")]
    failed = bool(evidence.find(".", "generate", "template", "script"))
    make = problem if failed else note
    yield make(
        "prompt.tokenizer-alone",
        "a tokenizer was loaded in place of the processor",
        "an omni model needs its processor: it applies the chat template, and makes features of sounds, pictures and video, "
        "which a tokenizer cannot",
        [f"{load.loader}.from_pretrained({load.path!r}) and no processor"],
        "from transformers import Qwen3OmniMoeProcessor\nprocessor = Qwen3OmniMoeProcessor.from_pretrained(path)\n"
        + MESSAGES_FIX,
    )


def no_template(evidence: Evidence) -> Iterator[Explanation]:
    """A checkpoint without a chat template."""
    for thrown in evidence.find(r"chat[_ ]template.{0,80}(not set|no template|does not have)|Cannot use chat template"):
        yield problem(
            "prompt.no-template",
            "the checkpoint has no chat template",
            "apply_chat_template reads chat_template.jinja of the checkpoint's folder, and it is not there",
            told(thrown),
            "copy chat_template.jinja from the original checkpoint",
        )
        return


RULES = (no_roles, string_content, tokenizer_alone, no_template)
