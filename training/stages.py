"""The bodies of the stages, and what they hand to one another."""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from training.options import AGAIN, RATES, ROW_TOKENS, SHARES, SPEECH_TASKS, TASKS

UNFINISHED = "unfinished"
"""Folder of the result so far, inside that of the results; removed when the weights are written there."""

NOTED = ("codec", "thinker")
"""Stages that say at their end how far they came."""


class Run:
    """One run of `train`, or of some of its stages.

    Args:
        options: of the command line.
        begun: the monotonic clock when the run began, for the log.

    Attributes:
        pace: times which the stages train; below 1 when the run is late.
    """

    def __init__(self, options: argparse.Namespace, begun: float | None = None) -> None:
        import torch

        from training import data
        from training.architecture import trained_config

        self.options = options
        self.begun = time.monotonic() if begun is None else begun
        self.pace = 1.0
        options.out.mkdir(parents=True, exist_ok=True)
        self.work: Path = options.work or options.out.parent / "work"
        self.work.mkdir(parents=True, exist_ok=True)
        self.device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = False
        self.data = data.load(options.data)
        self.config = trained_config()
        self.tokenizer = data.tokenizer()
        self.capture = not options.step_by_step

    @cached_property
    def built(self) -> tuple[Any, dict[str, Any]]:
        """The model, and the helpers' weights of the earlier result if there is one."""
        from training import export
        from training.architecture import build

        model = build(self.options.seed)
        before = export.read(model, self.options.before) if self.options.before else {}
        return model.to(self.device).eval(), before

    @property
    def model(self) -> Any:
        return self.built[0]

    @property
    def before(self) -> dict[str, Any]:
        return self.built[1]

    def log(self, text: str) -> None:
        line = f"{time.strftime('%H:%M:%S')} {time.monotonic() - self.begun:6.1f} s  {text}"
        print(line, flush=True)
        with (self.options.out / "log.txt").open("a") as file:
            file.write(line + "\n")

    def clock_of(self, stage: str) -> Callable[[Any, dict[str, Any]], Any]:
        from training.schedule import Clock

        minutes = getattr(self.options, f"{stage}_minutes")
        seconds = 60 * (SHARES[stage] * self.options.minutes if minutes is None else minutes)
        rate = RATES[stage] * (AGAIN if self.before else 1.0)
        return lambda optimizer, modules: Clock(
            stage, seconds, optimizer, rate, modules, self.work / f"{stage}.state", self.log, self.pace
        )

    def author(self, test: bool, seed: int) -> Any:
        from training.conversations import Author

        return Author(self.data, self.tokenizer, self.config, test=test, seed=seed)

    def batches(self, tasks: dict[str, float], rows: int, speech: Any = None, space: Any = None) -> Any:
        from training.batches import Batches, loader

        whole = sum(tasks.values())
        shares = {task: max(1, round(rows * share / whole)) for task, share in tasks.items()}
        pad = self.config["thinker_config"]["text_config"]["vocab_size"] - 33
        return loader(
            Batches(partial(self.author, False), shares, self.options.seed * 1000 + 1, pad, speech, space),
            self.options.workers,
        )

    def result(self, name: str) -> Path:
        """Where a stage leaves its weights."""
        return self.work / f"{name}.pt"

    def save(self, name: str, module: Any) -> None:
        import torch

        partial_path = self.work / f"{name}.partial"
        torch.save(module.state_dict(), partial_path)
        partial_path.replace(self.result(name))

    def load(self, name: str, module: Any) -> None:
        """A stage's result; the earlier result's where there is none, which the model itself has already."""
        import torch

        path = self.result(name)
        if not path.exists():
            if self.before and (name in ("thinker", "talker", "code2wav") or self.helper(name, module)):
                return
            raise SystemExit(f"{path} is missing: run its stage first")
        module.load_state_dict(torch.load(path, map_location=self.device, weights_only=True))

    def note(self, name: str, values: dict[str, Any]) -> None:
        """Adds to the results; a file for each stage, because two stages run side by side."""
        path = self.work / f"results.{name}.json"
        path.write_text(json.dumps(values, indent=2) + "\n")
        self.log(
            f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in values.items() if isinstance(value, float))
        )

    def helper(self, name: str, module: Any) -> bool:
        """Weights of an earlier result for what is no part of the model; whether there are any."""
        found = {
            key.removeprefix(f"{name}."): value for key, value in self.before.items() if key.startswith(f"{name}.")
        }
        if found:
            module.load_state_dict(found)
        return bool(found)

    def known(self, name: str, module: Any) -> bool:
        """Takes what an interrupted run or the earlier result has of it, if there is any."""
        if self.options.on_call and self.result(name).exists():
            self.load(name, module)
            return True
        return self.helper(name, module)

    def codec(self) -> None:
        from training import codec, ear, judge

        listener, teacher = judge.Judge().to(self.device), ear.Ear().to(self.device)
        if not self.known("judge", listener):
            judge.train(listener, self.data, self.clock_of("judge"), self.options.seed)
        listener.eval()
        self.save("judge", listener)
        accuracy = judge.examine(listener, self.data)
        if not self.known("ear", teacher):
            ear.train(teacher, self.data, self.clock_of("ear"), self.options.seed + 1, self.capture)
        teacher.eval()
        self.save("ear", teacher)
        encoder = codec.Encoder(self.config["code2wav_config"]["hidden_size"]).to(self.device)
        fresh = not self.helper("encoder", encoder)
        codec.train(
            self.model,
            encoder,
            teacher,
            self.data,
            self.clock_of("codec"),
            self.options.seed,
            fresh=fresh,
            capture=self.capture,
            count=self.options.crops,
        )
        self.save("encoder", encoder)
        self.save("code2wav", self.model.code2wav)
        self.note("codec", {"judge on held-out recordings": accuracy, **self.coded(encoder, listener)})

    def coded(self, encoder: Any, listener: Any) -> dict[str, float]:
        """Whether the judge still hears the digit of a held-out recording that went through the codec."""
        import torch
        from torch.nn import functional as F

        from training import codec, judge

        numbers = self.data.wave_numbers(True)[: self.options.examples]
        right = 0
        for number, codes in zip(
            numbers, codec.codes_of(encoder, self.model.code2wav, self.data, numbers), strict=True
        ):
            with torch.no_grad():
                wave = self.model.code2wav(torch.from_numpy(codes.astype("int64")).T[None].to(self.device))[0]
            low = judge.lowered(F.pad(wave.float(), (0, -wave.shape[-1] % 3)))
            digit = judge.heard(listener, low, torch.tensor([low.shape[-1]], device=self.device))
            right += int(digit[0]) == self.data.wave_digits[number]
        return {"judge on held-out recordings through the codec": right / len(numbers)}

    def thinker(self) -> None:
        from training import thinker
        from training.batches import Space

        space = Space(ROW_TOKENS, self.options.pictures, self.options.sounds)
        batches = self.batches(TASKS, self.options.rows, space=space)
        clock = self.clock_of("thinker")
        thinker.train(self.model, self.data, batches, clock, self.options.seed, self.capture)
        self.save("thinker", self.model.thinker)
        self.result("eye").unlink(missing_ok=True)
        self.note("thinker", thinker.examine(self.model, self.data, self.author(True, 7), self.options.examples))

    def eye(self) -> None:
        from training import eye
        from training.towers import tower_of

        self.load("thinker", self.model.thinker)
        author = self.author(False, self.options.seed)
        clock = self.clock_of("eye")
        eye.train(self.model, self.data, author, clock, self.options.seed, self.options.eye_pictures, self.log)
        self.save("eye", tower_of(self.model.thinker, "visual"))

    def see(self) -> None:
        """The thinker, with the eye if that stage was run."""
        from training.towers import tower_of

        self.load("thinker", self.model.thinker)
        if self.result("eye").exists():
            self.load("eye", tower_of(self.model.thinker, "visual"))

    def script(self, encoder: Any, teacher: Any) -> Any:
        import numpy as np

        from training import codec
        from training.data import VOICES
        from training.script import Script

        voices = [self.data.speakers.tolist().index(speaker) for speaker in VOICES.values()]
        numbers = self.data.wave_numbers(False)
        numbers = numbers[np.isin(self.data.wave_speakers[numbers], voices)]
        made = codec.codes_of(encoder, self.model.code2wav, self.data, numbers)
        codes = dict(zip(numbers.tolist(), made, strict=True))
        clear = codec.clearness(teacher, self.model.code2wav, self.data, codes)
        quiet = codec.silence(encoder, self.model.code2wav)
        return Script(self.data, codes, clear, quiet, self.config, self.options.seed)

    def heard(self) -> tuple[Any, Any, Any]:
        """Judge, encoder and ear; the model's code2wav is loaded too."""
        from training import codec, ear, judge

        listener = judge.Judge().to(self.device).eval()
        encoder = codec.Encoder(self.config["code2wav_config"]["hidden_size"]).to(self.device).eval()
        teacher = ear.Ear().to(self.device).eval()
        self.load("judge", listener)
        self.load("encoder", encoder)
        self.load("ear", teacher)
        self.load("code2wav", self.model.code2wav)
        return listener, encoder, teacher

    def talker(self) -> None:
        from training import talker
        from training.batches import Space

        _, encoder, teacher = self.heard()
        self.see()
        script = self.script(encoder, teacher)
        rows = max(8, self.options.rows // 2)
        # Two media at most in a row, and those of an earlier turn.
        batches = self.batches(SPEECH_TASKS, rows, script, Space(ROW_TOKENS, rows, rows))
        talker.train(self.model, self.data, batches, self.clock_of("talker"), self.options.seed, self.capture)
        self.save("talker", self.model.talker)

    def examine(self) -> None:
        import torch

        from training import export, speech, thinker
        from training.batches import batch

        listener, encoder, teacher = self.heard()
        self.see()
        self.load("talker", self.model.talker)
        helpers = {"judge": listener, "encoder": encoder, "ear": teacher}
        # An examination that is cut off leaves no earlier results beside the new weights.
        (self.options.out / "results.json").unlink(missing_ok=True)
        export.write(self.model, helpers, self.options.out)
        # From here on the weights are what was written: BF16.
        self.model.load_state_dict({name: value.bfloat16().float() for name, value in self.model.state_dict().items()})
        script, author = self.script(encoder, teacher), self.author(True, 11)
        random = torch.Generator(self.device).manual_seed(self.options.seed)
        results: dict[str, Any] = {
            "thinker in BF16": thinker.examine(self.model, self.data, self.author(True, 7), self.options.examples)
        }
        results["speech, sampled"] = speech.examine(
            self.model, listener, self.data, author, script, self.options.takes, random
        )
        results["speech, greedy"] = speech.examine(self.model, listener, self.data, author, script, 2, None)
        rows = thinker.all_rows(author, 60)
        tensors = thinker.to_device(batch(rows, author.end, 0), self.device)
        senses = thinker.Senses(self.model.thinker, self.data)
        results["weights"] = export.weight_spread(self.model)
        results["activations"] = export.activation_spread(
            self.model, lambda: thinker.read(self.model.thinker, senses, tensors, None)
        )
        results |= self.notes()
        results["parameters"] = sum(one.numel() for one in self.model.parameters())
        partial = self.options.out / "results.json.partial"
        partial.write_text(json.dumps(results, indent=2) + "\n")
        partial.replace(self.options.out / "results.json")
        shutil.rmtree(self.options.out / UNFINISHED, ignore_errors=True)
        self.log(json.dumps({name: results[name] for name in ("thinker in BF16", "speech, sampled", "speech, greedy")}))

    def keep(self) -> None:
        """Writes what there is so far as an earlier result to go on from, in case that the run does not come to its end."""
        from training import export

        helpers = {}
        if self.result("thinker").exists():
            self.see()
        if self.result("code2wav").exists():
            helpers = dict(zip(("judge", "encoder", "ear"), self.heard(), strict=True))
        if self.result("talker").exists():
            self.load("talker", self.model.talker)
        place = self.options.out / UNFINISHED
        place.mkdir(exist_ok=True)
        export.write(self.model, helpers, place)
        (place / "results.json").write_text(json.dumps(self.notes(), indent=2) + "\n")

    def notes(self) -> dict[str, Any]:
        """What stages wrote with `note`; of the earlier result, if a stage was not run here."""
        before = self.options.before / "results.json" if self.options.before else None
        known = json.loads(before.read_text()) if before and before.exists() else {}
        found = {stage: known[stage] for stage in NOTED if stage in known}
        for stage in NOTED:
            path = self.work / f"results.{stage}.json"
            if path.exists():
                found[stage] = json.loads(path.read_text())
        return found
