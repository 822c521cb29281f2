"""The components of every layout, and why some of them are never quantized unasked."""

from __future__ import annotations

from collections.abc import Mapping

from omnifp4.models.base import Component, Kind, Part

_TALKER_ON_REQUEST = "on request: long audio suffers, because an error in one codec frame carries into all later ones"

_THINKER_WHY_WIDE = {
    Kind.ROUTER: "picks the experts: a small error sends a token to the wrong ones, and it is too small to save memory",
    Kind.NORMS: "vectors of scales and biases: nothing for a 4-bit matrix format to hold",
    Kind.EMBEDDINGS: "a lookup table: one row is read a token, so 4 bits save no time and its error enters every layer",
    Kind.HEAD: "reads the answer off the last state: its error changes the chosen token directly",
}

_TALKER_WHY_WIDE = {
    Kind.ATTENTION: _TALKER_ON_REQUEST,
    Kind.EXPERTS: _TALKER_ON_REQUEST,
    Kind.SHARED_EXPERTS: _TALKER_ON_REQUEST,
    Kind.MLP: _TALKER_ON_REQUEST,
    Kind.ROUTER: _THINKER_WHY_WIDE[Kind.ROUTER],
    Kind.NORMS: _THINKER_WHY_WIDE[Kind.NORMS],
    Kind.EMBEDDINGS: _THINKER_WHY_WIDE[Kind.EMBEDDINGS],
    Kind.HEAD: "chooses the first codec code of every audio frame: its error is heard directly",
    Kind.PROJECTIONS: "carry the thinker's states into the talker: all speech passes through these few matrices",
}

_WHOLE_WHY_WIDE = {
    Part.AUDIO_TOWER: "turns sound into states: its error is in all that the model hears, and it is a small share",
    Part.VISION_TOWER: (
        "turns pictures into states: its error is in all that the model sees, and its widths often do not divide into"
        " the tiles of FP4 kernels"
    ),
    Part.CODE_PREDICTOR: "runs many dependent steps for each audio frame: errors pile up, and it is a small share",
    Part.CODE2WAV: "makes the waveform: its error is noise in the sound itself, and most of it are convolutions",
}

Palette = Mapping[Kind, Component]
"""The component for each kind of tensor in a part."""

THINKER: Palette = {
    kind: Component(Part.THINKER, kind, _THINKER_WHY_WIDE.get(kind, ""))
    for kind in (
        Kind.ATTENTION,
        Kind.EXPERTS,
        Kind.SHARED_EXPERTS,
        Kind.MLP,
        Kind.ROUTER,
        Kind.NORMS,
        Kind.EMBEDDINGS,
        Kind.HEAD,
    )
}
TALKER: Palette = {kind: Component(Part.TALKER, kind, why) for kind, why in _TALKER_WHY_WIDE.items()}


def whole(part: Part) -> Component:
    """The one component of a part that recipes treat as a whole."""
    return Component(part, Kind.WEIGHTS, _WHOLE_WHY_WIDE[part])


def whole_palette(part: Part) -> Palette:
    """A palette that puts tensors of every kind into the one component of `part`."""
    return dict.fromkeys(Kind, whole(part))


AUDIO_TOWER = whole(Part.AUDIO_TOWER)
VISION_TOWER = whole(Part.VISION_TOWER)
CODE2WAV = whole(Part.CODE2WAV)
CODE_PREDICTOR: Palette = whole_palette(Part.CODE_PREDICTOR)
CODE2WAV_PALETTE: Palette = whole_palette(Part.CODE2WAV)
