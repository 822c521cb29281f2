"""One frame of speech from beginning to end, on tensors that stay where they are.

A frame is 80 ms: the talker's code, fifteen more from the code predictor, each drawn after the one before it, and the
talker's next step, which reads them all. `SpeechFrame.run` does this without asking the host anything, so that it can
be captured in one CUDA graph, and reads and writes nothing but the tensors held here and in its `Steps`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from omnifp4.decoding.speech_sampling import CodeSampling, choose, penalise
from omnifp4.decoding.speech_steps import Steps
from omnifp4.decoding.talker_opening import Opening

PREDICTOR_TOP_K = 50
PREDICTOR_TOP_P = 0.8
"""Transformers writes both in the talker's ``prepare_inputs_for_generation``; no config has them."""


class SpeechFrame:
    """The state of a speech between two frames, and the frame itself.

    Attributes:
        row: the frame's result, int64 ``[groups + 2]``: its codes, the next frame's first code, and whether all that
            was computed is finite.
        generator: draws all codes.
    """

    def __init__(self, talker: Any, steps: Steps, sampling: CodeSampling, frames: int) -> None:
        """`frames`: the most that a speech has; the text of that many is kept."""
        config = talker.config
        embedding = talker.get_input_embeddings().weight
        device, vocabulary = embedding.device, config.text_config.vocab_size
        hidden = config.text_config.hidden_size
        self.steps = steps
        self.sampling = sampling
        self.most_frames = frames
        self.groups = int(config.num_code_groups)
        self.generator = torch.Generator(device)
        self.row = torch.zeros(self.groups + 2, dtype=torch.long, device=device)
        self._code = torch.zeros((1, 1), dtype=torch.long, device=device)
        self._hidden = torch.zeros((1, 1, hidden), dtype=embedding.dtype, device=device)
        self._text = torch.zeros((1, frames, hidden), dtype=embedding.dtype, device=device)
        self._made = torch.zeros(1, dtype=torch.long, device=device)
        self._seen = torch.zeros((1, vocabulary), dtype=torch.bool, device=device)
        self._suppressed = torch.zeros((1, vocabulary), dtype=torch.bool, device=device)
        self._penalty = torch.ones((), dtype=torch.float32, device=device)
        self._temperature = torch.ones((), dtype=torch.float32, device=device)
        settings = talker.code_predictor.generation_config
        self._predictor = CodeSampling(sampling.greedy, top_k=PREDICTOR_TOP_K, top_p=PREDICTOR_TOP_P)
        self._predictor_temperature = torch.tensor(
            float(getattr(settings, "temperature", None) or 1.0), dtype=torch.float32, device=device
        )

    def begin(self, opening: Opening, sampling: CodeSampling, logits: Tensor, hidden: Tensor, seed: int) -> None:
        """Starts a speech; the steps have begun.

        Args:
            opening: the talker's input.
            sampling: of this speech; its temperature and penalty may differ from those of the last.
            logits: of the prompt's last position, float32 ``[1, vocabulary]``.
            hidden: its hidden state, ``[1, 1, H]``.
            seed: of all draws.
        """
        self.generator.manual_seed(seed)
        self._text.copy_(opening.pad.expand_as(self._text))
        said = min(self.most_frames, opening.text.shape[1])
        self._text[:, :said] = opening.text[:, :said]
        self._made.zero_()
        self._seen.zero_()
        self._suppressed.zero_()
        self._suppressed[0, torch.tensor(opening.suppressed, dtype=torch.long, device=logits.device)] = True
        self._penalty.fill_(sampling.repetition_penalty)
        self._temperature.fill_(sampling.temperature)
        self._hidden.copy_(hidden)
        self._code.copy_(self._draw(logits))

    def first_code(self) -> int:
        """Of the first frame; waits for the device."""
        return int(self._code)

    def run(self, talker: Any) -> None:
        """Makes one frame and the code that begins the next."""
        codes, embedding, sound = self.predict(talker)
        embedding = embedding + self._text.index_select(1, self._made)
        hidden = self.steps.talk(talker, embedding)
        logits = talker.codec_head(hidden)[:, -1].float()
        finite = (torch.isfinite(hidden).all() & torch.isfinite(sound).all()).view(1, 1)
        code = self._draw(logits)
        self.row.copy_(torch.cat([codes, code, finite.long()], dim=1)[0])
        self._hidden.copy_(hidden)
        self._code.copy_(code)
        self._made += 1

    def _draw(self, logits: Tensor) -> Tensor:
        scores = penalise(logits, self._seen, self._penalty)
        scores = scores.masked_fill(self._suppressed, -torch.inf)
        code = choose(scores, self.sampling, self._temperature, self.generator)
        self._seen.scatter_(1, code, True)
        return code

    def predict(self, talker: Any) -> tuple[Tensor, Tensor, Tensor]:
        """All codes of the frame ``[1, groups]``, the sum of their embeddings ``[1, 1, H]``, and the last state."""
        predictor = talker.code_predictor
        tables = predictor.get_input_embeddings()
        first = talker.get_input_embeddings()(self._code)
        states = self.steps.predict(talker, torch.cat([self._hidden, first], dim=1), 0)
        codes, embeddings = [self._code], [first]
        for group in range(1, self.groups):
            logits = predictor.lm_head[group - 1](states)[:, -1].float()
            codes.append(choose(logits, self._predictor, self._predictor_temperature, self.generator))
            embeddings.append(tables[group - 1](codes[-1]))
            if group + 1 < self.groups:
                states = self.steps.predict(talker, embeddings[-1], group + 1)
        return torch.cat(codes, dim=1), torch.cat(embeddings, dim=1).sum(1, keepdim=True), states
