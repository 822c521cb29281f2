"""omnifp4 generate and omnifp4 chat"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from omnifp4.cli import options

Images = Annotated[list[str] | None, typer.Option("--image", metavar="FILE", help="A picture; repeat for more.")]
Audios = Annotated[list[str] | None, typer.Option("--audio", metavar="FILE", help="A recording; repeat for more.")]
Videos = Annotated[
    list[str] | None, typer.Option("--video", metavar="FILE", help="A video with its sound; repeat for more.")
]
Speaker = Annotated[str | None, typer.Option(help="The voice, such as Ethan, Chelsie or Aiden.")]
System = Annotated[str | None, typer.Option(help="The system message.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …; the GPU if there is one and it is not given.")]
Seed = Annotated[int, typer.Option(help="The same seed gives the same answer.")]
Temperature = Annotated[
    float | None, typer.Option(min=0.0, help="0 takes the likeliest token; the checkpoint's own if not given.")
]
TopP = Annotated[float | None, typer.Option(help="Share of probability that is sampled from.")]
TopK = Annotated[int | None, typer.Option(help="Number of candidates that is sampled from.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, help="The most tokens of text in an answer.")]
Stop = Annotated[list[str] | None, typer.Option(help="Text that ends the answer; repeat for more.")]
Context = Annotated[str, typer.Option(help="When the conversation grows too long: trim the oldest turns, or refuse.")]
AllowUrls = Annotated[bool, typer.Option("--allow-urls", help="Media may be web addresses, not only files.")]
LongMedia = Annotated[str, typer.Option(help="Audio and video above the limits: refuse, or trim to their beginning.")]


def generate(
    model: options.Model,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="The question; may be left out with media.")
    ] = None,
    image: Images = None,
    audio: Audios = None,
    video: Videos = None,
    speak: Annotated[Path | None, typer.Option(metavar="WAV", help="Speak the answer to this file, 24 kHz.")] = None,
    speaker: Speaker = None,
    system: System = None,
    max_tokens: MaxTokens = 1024,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = 0,
    stop: Stop = None,
    device: Device = None,
    context: Context = "trim",
    allow_urls: AllowUrls = False,
    long_media: LongMedia = "refuse",
    revision: options.Revision = None,
) -> None:
    """Ask once: text, pictures, sound and video in; text on stdout as it is made, speech to a file."""
    hush_libraries()
    from omnifp4.chat.console import run_generate

    run_generate(
        _located(model, revision),
        prompt,
        images=image or (),
        audios=audio or (),
        videos=video or (),
        speak_path=speak,
        speaker=speaker,
        chat=_settings(device, speak is not None, system, context, allow_urls, long_media),
        **_wishes(max_tokens, temperature, top_p, top_k, seed, stop),
    )


def chat(
    model: options.Model,
    speech: Annotated[bool, typer.Option(help="Load the talker; without it answers cannot be spoken.")] = True,
    system: System = None,
    max_tokens: MaxTokens = 1024,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = 0,
    stop: Stop = None,
    device: Device = None,
    context: Context = "trim",
    allow_urls: AllowUrls = False,
    long_media: LongMedia = "refuse",
    revision: options.Revision = None,
) -> None:
    """Talk in turns; /help lists the commands for pictures, sound, video and speech."""
    hush_libraries()
    from omnifp4.chat.console import run_chat

    run_chat(
        _located(model, revision),
        chat=_settings(device, speech, system, context, allow_urls, long_media),
        **_wishes(max_tokens, temperature, top_p, top_k, seed, stop),
    )


def hush_libraries() -> None:
    """Keep the libraries' advice to programmers out of a conversation; errors stay."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    warnings.filterwarnings("ignore", module=r"transformers\.")


def _located(model: str, revision: str | None) -> str:
    """The folder of a model; a Hub id is downloaded first."""
    from omnifp4.checkpoint.hub import local_folder

    return str(local_folder(model, revision))


def _settings(
    device: str | None, speech: bool, system: str | None, context: str, allow_urls: bool, long_media: str
) -> dict[str, Any]:
    """Arguments of `OmniChat`."""
    from omnifp4.chat.media import MediaRules

    rules = MediaRules(allow_urls=allow_urls, long_media=long_media)  # type: ignore[arg-type]  # it checks itself
    return {"device": device, "speech": speech, "system": system, "context": context, "rules": rules}


def _wishes(
    max_tokens: int,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    seed: int,
    stop: list[str] | None,
) -> dict[str, Any]:
    """Options of an answer."""
    return {
        "max_new_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
        "stop": tuple(stop or ()),
    }
