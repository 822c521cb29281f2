"""``bert``: BERT encoders, also as sentence-transformers publishes them.

`BertModel` writes names without a prefix, the models with a task on top write ``bert.`` before them. Checkpoints from
TensorFlow days name the two vectors of a layer normalization ``gamma`` and ``beta``. Both are settled by the names.
"""

from __future__ import annotations

from omnifp4.models.base import Config, Kind, Layout
from omnifp4.models.components import THINKER
from omnifp4.models.section import Schema, Section
from omnifp4.models.tensors import TensorList

SCHEMA = Schema(
    "BertConfig",
    {
        "vocab_size": 30522,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "add_cross_attention": False,
    },
)


def layout(config: Config, names: frozenset[str]) -> Layout:
    """The encoder with the pooler and the heads that `names` (or else ``architectures``) show.

    Raises:
        ModelError: the config lacks or contradicts what the layout needs, or asks for cross-attention.
    """
    section = Section(config, SCHEMA)
    if section.flag("add_cross_attention"):
        raise section.refuse("add_cross_attention", True, "false: only encoders are known")
    if "position_embedding_type" in config:
        section.require("position_embedding_type", "absolute")
    architecture = section.architecture()
    if names:
        prefix = "bert." if any(name.startswith("bert.") for name in names) else ""
    else:
        prefix = "" if architecture in ("", "BertModel") else "bert."
    writer = _Writer(any(name.endswith("LayerNorm.gamma") for name in names))
    _add_encoder(writer, prefix, section)
    width = section.size("hidden_size")
    _add_pooler(writer, prefix, width, names)
    _add_heads(writer, section, width, architecture, names)
    return Layout("bert", tuple(writer.tensors))


class _Writer(TensorList):
    def __init__(self, greek: bool) -> None:
        super().__init__()
        self.norm_names = ("gamma", "beta") if greek else ("weight", "bias")

    def layer_norm(self, module: str, width: int) -> None:
        for name in self.norm_names:
            self.tensor(f"{module}.{name}", (width,), THINKER[Kind.NORMS])


def _add_encoder(out: _Writer, prefix: str, section: Section) -> None:
    width, inner_width = section.size("hidden_size"), section.size("intermediate_size")
    heads = section.size("num_attention_heads")
    if width % heads:
        raise section.refuse("num_attention_heads", heads, f"a divisor of hidden_size, {width}")
    for table, key in (
        ("word_embeddings", "vocab_size"),
        ("position_embeddings", "max_position_embeddings"),
        ("token_type_embeddings", "type_vocab_size"),
    ):
        out.tensor(f"{prefix}embeddings.{table}.weight", (section.size(key), width), THINKER[Kind.EMBEDDINGS])
    out.layer_norm(f"{prefix}embeddings.LayerNorm", width)
    attention, mlp = THINKER[Kind.ATTENTION], THINKER[Kind.MLP]
    for layer in range(section.layers("num_hidden_layers")):
        name = f"{prefix}encoder.layer.{layer}"
        for part in ("query", "key", "value"):
            group = f"{name}.attention.self.qkv"
            out.linear(f"{name}.attention.self.{part}", width, width, attention, bias=True, scale_group=group)
        out.linear(f"{name}.attention.output.dense", width, width, attention, bias=True)
        out.layer_norm(f"{name}.attention.output.LayerNorm", width)
        out.linear(f"{name}.intermediate.dense", width, inner_width, mlp, bias=True)
        out.linear(f"{name}.output.dense", inner_width, width, mlp, bias=True)
        out.layer_norm(f"{name}.output.LayerNorm", width)


def _add_pooler(out: _Writer, prefix: str, width: int, names: frozenset[str]) -> None:
    """Many checkpoints drop it, as sentence embeddings are averaged instead: it is always optional."""
    if f"{prefix}pooler.dense.weight" in names or not names:
        out.linear(f"{prefix}pooler.dense", width, width, THINKER[Kind.HEAD], bias=True, optional=True)


def _add_heads(out: _Writer, section: Section, width: int, architecture: str, names: frozenset[str]) -> None:
    """The heads of pre-training, and the one layer of a classifier or of question answering."""
    head = THINKER[Kind.HEAD]
    masked = any(name.startswith("cls.predictions.") for name in names)
    if masked or (not names and architecture in ("BertForMaskedLM", "BertForPreTraining", "BertLMHeadModel")):
        vocabulary = section.size("vocab_size")
        out.tensor("cls.predictions.bias", (vocabulary,), head)
        out.linear("cls.predictions.transform.dense", width, width, head, bias=True)
        out.layer_norm("cls.predictions.transform.LayerNorm", width)
        # The decoder repeats the word embeddings and the bias above.
        if not names or "cls.predictions.decoder.weight" in names:
            out.linear("cls.predictions.decoder", width, vocabulary, head, optional=True)
        if not names or "cls.predictions.decoder.bias" in names:
            out.tensor("cls.predictions.decoder.bias", (vocabulary,), head, optional=True)
    for module, outputs in (("cls.seq_relationship", 2), ("qa_outputs", 2), ("classifier", None)):
        if f"{module}.weight" in names:
            out.linear(module, width, outputs or _labels(section, architecture), head, bias=True)


def _labels(section: Section, architecture: str) -> int:
    """Outputs of ``classifier``: the labels, which Transformers takes to be two where the config names none."""
    if architecture == "BertForMultipleChoice":
        return 1
    if "num_labels" in section.values:
        return section.size("num_labels")
    labels = section.optional_section("id2label", SCHEMA)
    return len(labels.values) if labels is not None else 2
