"""A text model alone: embeddings, a decoder, a head. The thinker of `Part.THINKER`, under the names of its own type."""

from __future__ import annotations

from omnifp4.models.base import Config, Kind, Layout
from omnifp4.models.components import THINKER
from omnifp4.models.decoder import DecoderRules, add_decoder, add_head, read_decoder
from omnifp4.models.section import Schema, Section
from omnifp4.models.tensors import TensorList


def text_layout(model_type: str, config: Config, names: frozenset[str], schema: Schema, rules: DecoderRules) -> Layout:
    """The layout of a causal language model, or of its base model, which has no prefix ``model.`` and no head.

    Embedding models are published as base models. Which of the two it is, `names` say, or else ``architectures``.

    Raises:
        ModelError: the config lacks or contradicts what the layout needs.
    """
    section = Section(config, schema)
    decoder = read_decoder(section, rules)
    vocabulary = section.size("vocab_size")
    base = "embed_tokens.weight" in names if names else section.architecture().endswith("Model")
    prefix = "" if base else "model."
    out = TensorList()
    out.tensor(f"{prefix}embed_tokens.weight", (vocabulary, decoder.width), THINKER[Kind.EMBEDDINGS])
    add_decoder(out, prefix, decoder, THINKER)
    if not base:
        tied = section.flag("tie_word_embeddings")
        add_head(out, "lm_head", decoder.width, vocabulary, THINKER, tied=tied, names=names)
    return Layout(model_type, tuple(out.tensors), tuple(out.fused), decoder.experts)
