"""``python -m training``: prepares the data, trains the tiny omni model, examines it.

    python -m training prepare --recordings FSDD/recordings --text A.txt B.txt --out .train/data.npz
    python -m training train --data .train/data.npz --out OUT --minutes 6
    python -m training train --data .train/data.npz --out OUT --from BEFORE       # goes on from an earlier result
    python -m training train --data .train/data.npz --out OUT --stage talker      # one stage again
    python -m training train --data .train/data.npz --out OUT --from BEFORE --stage eye --stage examine

Five stages. ``codec`` (with the judge) and ``thinker`` need nothing of each other and run side by side; ``eye`` trains the
thinker's vision tower alone; ``talker`` needs all three; ``examine`` writes the checkpoint and its results. A stage that
was interrupted goes on where it was; one that is done is not run again unless it is named. A stage that is named takes
what it needs of the others from this run or, where this run has none, from the earlier result.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

STAGES = ("codec", "thinker", "eye", "talker", "examine")
SHARES = {"judge": 0.04, "ear": 0.04, "codec": 0.62, "thinker": 0.6, "eye": 0.1, "talker": 0.26}
"""Of the minutes; judge, ear and codec together run beside the thinker."""
RATES = {"judge": 2e-3, "ear": 2e-3, "codec": 1e-3, "thinker": 1.5e-3, "eye": 8e-4, "talker": 2e-3}
"""Highest learning rates."""
AGAIN = 0.7
"""Times the rates, for what goes on from an earlier result."""
ROW_TOKENS = 96
"""Tokens of a row in training; the few conversations that are longer are left out."""
TASKS = {"picture": 3, "sound": 2.5, "two": 5, "arithmetic": 1.5, "repeat": 3, "continue": 1, "text": 4}
"""Shares of a thinker's batch."""
SPEECH_TASKS = {"picture": 2, "sound": 2, "two": 2, "arithmetic": 2, "repeat": 3, "continue": 0.3}
"""Shares of a talker's batch."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="python -m training", description=__doc__.split("\n\n")[0])
    verbs = result.add_subparsers(dest="verb", required=True)
    prepare = verbs.add_parser("prepare", help="pack folders of open data into one file")
    prepare.add_argument("--recordings", type=Path, required=True, help="folder of {digit}_{speaker}_{index}.wav")
    prepare.add_argument("--text", type=Path, nargs="+", required=True, help="plain text files")
    prepare.add_argument("--out", type=Path, required=True)
    train = verbs.add_parser("train", help="train")
    train.add_argument("--data", type=Path, required=True, help="what `prepare` wrote")
    train.add_argument("--out", type=Path, required=True, help="folder of the results")
    train.add_argument(
        "--work", type=Path, help="folder of the stages' full-precision results; OUT/../work if not given"
    )
    train.add_argument("--from", dest="before", type=Path, help="folder of an earlier result, whose weights go on")
    train.add_argument("--stage", choices=STAGES, action="append", help="run these stages only, even if done")
    train.add_argument("--minutes", type=float, default=6.0, help="of training, in all")
    for stage, share in SHARES.items():
        train.add_argument(f"--{stage}-minutes", type=float, help=f"of this part alone; {share} of all if not given")
    train.add_argument("--pictures", type=int, default=512, help="pictures in a batch, in conversations or alone")
    train.add_argument("--eye-pictures", type=int, default=256, help="pictures in a batch of the eye's stage")
    train.add_argument("--sounds", type=int, default=256, help="recordings in a batch, in conversations or alone")
    train.add_argument("--crops", type=int, default=48, help="crops of sound in a batch of the codec")
    train.add_argument("--step-by-step", action="store_true", help="no CUDA graphs")
    train.add_argument("--rows", type=int, default=384, help="conversations in a batch")
    train.add_argument("--workers", type=int, default=max(0, min(10, (os.cpu_count() or 2) - 5)))
    train.add_argument("--device", default=None, help="cuda if there is one, else cpu")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--takes", type=int, default=10, help="how often each voice says each digit in the examination")
    train.add_argument("--examples", type=int, default=400, help="most held-out examples of a kind in the examination")
    return result


def tokenizer() -> Any:
    """The tiny model's."""
    import tempfile

    from transformers import AutoTokenizer

    from omnifp4.tiny.checkpoint import TINY_FILES, asset_bytes

    with tempfile.TemporaryDirectory() as folder:
        for name in TINY_FILES:
            (Path(folder) / name).write_bytes(asset_bytes(name))
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)


class Run:
    """One run of `train`."""

    def __init__(self, options: argparse.Namespace) -> None:
        import torch

        from training import data
        from training.architecture import trained_config

        self.options = options
        self.begun = time.monotonic()
        options.out.mkdir(parents=True, exist_ok=True)
        self.work: Path = options.work or options.out.parent / "work"
        self.work.mkdir(parents=True, exist_ok=True)
        self.device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = False
        self.data = data.load(options.data)
        self.config = trained_config()
        self.tokenizer = tokenizer()
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
            stage, seconds, optimizer, rate, modules, self.work / f"{stage}.state", self.log
        )

    def author(self, test: bool, seed: int) -> Any:
        from training.conversations import Author

        return Author(self.data, self.tokenizer, self.config, test=test, seed=seed)

    def batches(self, tasks: dict[str, float], rows: int, speech: Any = None, space: Any = None) -> Any:
        from training.conversations import Batches, loader

        whole = sum(tasks.values())
        shares = {task: max(1, round(rows * share / whole)) for task, share in tasks.items()}
        pad = self.config["thinker_config"]["text_config"]["vocab_size"] - 33
        return loader(
            Batches(partial(self.author, False), shares, self.options.seed * 1000 + 1, pad, speech, space),
            self.options.workers,
        )

    def save(self, name: str, module: Any) -> None:
        import torch

        partial_path = self.work / f"{name}.partial"
        torch.save(module.state_dict(), partial_path)
        partial_path.replace(self.work / f"{name}.pt")

    def load(self, name: str, module: Any) -> None:
        """A stage's result; the earlier result's where there is none, which the model itself has already."""
        import torch

        path = self.work / f"{name}.pt"
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

    def codec(self) -> None:
        from training import codec, ear, judge

        listener = judge.Judge().to(self.device)
        if not self.helper("judge", listener):
            judge.train(listener, self.data, self.clock_of("judge"), self.options.seed)
        listener.eval()
        self.save("judge", listener)
        accuracy = judge.examine(listener, self.data)
        teacher = ear.Ear().to(self.device)
        if not self.helper("ear", teacher):
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
        from training.conversations import Space

        space = Space(ROW_TOKENS, self.options.pictures, self.options.sounds)
        batches = self.batches(TASKS, self.options.rows, space=space)
        clock = self.clock_of("thinker")
        thinker.train(self.model, self.data, batches, clock, self.options.seed, self.capture)
        self.save("thinker", self.model.thinker)
        (self.work / "eye.pt").unlink(missing_ok=True)
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
        if (self.work / "eye.pt").exists():
            self.load("eye", tower_of(self.model.thinker, "visual"))

    def script(self, encoder: Any, teacher: Any) -> Any:
        import numpy as np

        from training import codec
        from training.data import VOICES
        from training.talker import Script

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
        from training.conversations import Space

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
        from safetensors.torch import save_file

        from training import export, talker, thinker
        from training.conversations import batch

        listener, encoder, teacher = self.heard()
        self.see()
        self.load("talker", self.model.talker)
        export.write(self.model, self.options.out)
        helpers = {f"judge.{name}": value for name, value in listener.state_dict().items()}
        helpers |= {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
        helpers |= {f"ear.{name}": value for name, value in teacher.state_dict().items()}
        save_file(
            {name: value.half().contiguous().cpu() for name, value in helpers.items()},
            self.options.out / "helpers.safetensors",
        )
        # From here on the weights are what was written: BF16.
        self.model.load_state_dict({name: value.bfloat16().float() for name, value in self.model.state_dict().items()})
        script, author = self.script(encoder, teacher), self.author(True, 11)
        random = torch.Generator(self.device).manual_seed(self.options.seed)
        results: dict[str, Any] = {
            "thinker in BF16": thinker.examine(self.model, self.data, self.author(True, 7), self.options.examples)
        }
        results["speech, sampled"] = talker.examine(
            self.model, listener, self.data, author, script, self.options.takes, random
        )
        results["speech, greedy"] = talker.examine(self.model, listener, self.data, author, script, 2, None)
        rows = thinker.all_rows(author, 60)
        tensors = thinker.to_device(batch(rows, author.end, 0), self.device)
        senses = thinker.Senses(self.model.thinker, self.data)
        results["weights"] = export.weight_spread(self.model)
        results["activations"] = export.activation_spread(
            self.model, lambda: thinker.read(self.model.thinker, senses, tensors, None)
        )
        for stage in ("codec", "thinker"):
            results[stage] = self.noted(stage)
        results["parameters"] = sum(one.numel() for one in self.model.parameters())
        (self.options.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        self.log(json.dumps({name: results[name] for name in ("thinker in BF16", "speech, sampled", "speech, greedy")}))

    def noted(self, stage: str) -> Any:
        """What `note` wrote; of the earlier result, if that stage was not run here."""
        path = self.work / f"results.{stage}.json"
        if path.exists():
            return json.loads(path.read_text())
        return json.loads((self.options.before / "results.json").read_text())[stage]

    def run(self) -> None:
        asked = self.options.stage
        if asked:
            for stage in STAGES:
                if stage in asked:
                    getattr(self, stage)()
            return
        done = {"codec": "code2wav.pt", "thinker": "thinker.pt"}
        beside = {
            stage: self.start(stage)
            for stage in ("thinker", "codec")
            # Processes of their own: both stages wait for Python more than for the device.
            if not (self.work / done[stage]).exists()
        }
        _ = self.built
        self.watch(beside)
        for stage in ("eye", "talker"):
            if not (self.work / f"{stage}.pt").exists():
                self.watch({stage: self.start(stage)})
        self.examine()

    def watch(self, running: dict[str, Any]) -> None:
        """Waits for stages; one whose step could not be captured runs again, step by step."""
        from training.steps import NOT_CAPTURED

        while running:
            time.sleep(0.2)
            for stage, process in list(running.items()):
                status = process.poll()
                if status == NOT_CAPTURED:
                    running[stage] = self.start(stage, "--step-by-step")
                elif status is not None:
                    del running[stage]
                    if status:
                        for other in running.values():
                            other.terminate()
                        raise SystemExit(f"the stage {stage} failed")

    def start(self, stage: str, *more: str) -> Any:
        """Begins a stage in a process of its own; on a second GPU, if there is one, the codec's."""
        import torch

        environment = dict(os.environ)
        if stage == "codec" and torch.cuda.device_count() > 1:
            environment["CUDA_VISIBLE_DEVICES"] = "1"
        command = [sys.executable, "-m", "training", *sys.argv[1:], "--stage", stage, *more]
        return subprocess.Popen(command, env=environment)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if options.verb == "prepare":
        from training import data

        data.prepare(options.recordings, options.text, tokenizer(), options.out)
        print(f"{options.out}: {options.out.stat().st_size / 1e6:.1f} MB")
        return
    Run(options).run()


if __name__ == "__main__":
    main()
