"""``python -m training``: prepares the data, trains the tiny omni model, examines it.

    python -m training prepare --recordings FSDD/recordings --text A.txt B.txt --out .train/data.npz
    python -m training train --data .train/data.npz --out OUT --minutes 6
    python -m training train --data .train/data.npz --out OUT --stage talker      # one stage again

Four stages. ``codec`` (with the judge) and ``thinker`` need nothing of each other and run side by side; ``talker`` needs
both; ``examine`` writes the checkpoint and its results. A stage that was interrupted goes on where it was; one that is
done is not run again unless it is named.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

STAGES = ("codec", "thinker", "talker", "examine")
SHARES = {"judge": 0.06, "codec": 0.42, "thinker": 0.56, "talker": 0.27}
"""Of the minutes; judge and codec together run beside the thinker."""
TASKS = {"picture": 3, "sound": 4, "two": 5, "arithmetic": 1.5, "repeat": 2, "continue": 1, "text": 4}
"""Shares of a thinker's batch."""
SPEECH_TASKS = {"picture": 2, "sound": 2, "two": 2, "arithmetic": 2, "repeat": 4, "continue": 0.4}
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
    train.add_argument("--stage", choices=STAGES, action="append", help="run these stages only, even if done")
    train.add_argument("--minutes", type=float, default=6.0, help="of training, in all")
    train.add_argument("--rows", type=int, default=384, help="conversations in a batch")
    train.add_argument("--workers", type=int, default=max(0, min(10, (os.cpu_count() or 2) - 4)))
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
        from training.architecture import build, trained_config

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
        self.model = build(options.seed).to(self.device).eval()

    def log(self, text: str) -> None:
        line = f"{time.strftime('%H:%M:%S')} {time.monotonic() - self.begun:6.1f} s  {text}"
        print(line, flush=True)
        with (self.options.out / "log.txt").open("a") as file:
            file.write(line + "\n")

    def clock_of(self, stage: str, rate: float) -> Callable[[Any, dict[str, Any]], Any]:
        from training.schedule import Clock

        seconds = SHARES[stage] * self.options.minutes * 60
        return lambda optimizer, modules: Clock(
            stage, seconds, optimizer, rate, modules, self.work / f"{stage}.state", self.log
        )

    def author(self, test: bool, seed: int) -> Any:
        from training.conversations import Author

        return Author(self.data, self.tokenizer, self.config, test=test, seed=seed)

    def batches(self, tasks: dict[str, float], rows: int, speech: Any = None) -> Any:
        from training.conversations import Batches, loader

        whole = sum(tasks.values())
        shares = {task: max(1, round(rows * share / whole)) for task, share in tasks.items()}
        pad = self.config["thinker_config"]["text_config"]["vocab_size"] - 33
        return loader(
            Batches(partial(self.author, False), shares, self.options.seed * 1000 + 1, pad, speech),
            self.options.workers,
        )

    def save(self, name: str, module: Any) -> None:
        import torch

        partial_path = self.work / f"{name}.partial"
        torch.save(module.state_dict(), partial_path)
        partial_path.replace(self.work / f"{name}.pt")

    def load(self, name: str, module: Any) -> None:
        import torch

        path = self.work / f"{name}.pt"
        if not path.exists():
            raise SystemExit(f"{path} is missing: run its stage first")
        module.load_state_dict(torch.load(path, map_location=self.device, weights_only=True))

    def note(self, name: str, values: dict[str, Any]) -> None:
        """Adds to the results; a file for each stage, because two stages run side by side."""
        path = self.work / f"results.{name}.json"
        path.write_text(json.dumps(values, indent=2) + "\n")
        self.log(
            f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in values.items() if isinstance(value, float))
        )

    def codec(self) -> None:
        from training import codec, judge

        listener = judge.Judge().to(self.device)
        judge.train(listener, self.data, self.clock_of("judge", 2e-3), self.options.seed)
        self.save("judge", listener)
        accuracy = judge.examine(listener, self.data)
        encoder = codec.Encoder(self.config["code2wav_config"]["hidden_size"]).to(self.device)
        codec.train(
            self.model,
            encoder,
            self.data,
            self.clock_of("codec", 1e-3),
            self.options.seed,
            max(4, self.options.rows // 8),
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

        batches = self.batches(TASKS, self.options.rows)
        thinker.train(self.model, self.data, batches, self.clock_of("thinker", 2e-3), self.options.seed)
        self.save("thinker", self.model.thinker)
        self.note("thinker", thinker.examine(self.model, self.data, self.author(True, 7), self.options.examples))

    def script(self, encoder: Any) -> Any:
        import numpy as np

        from training import codec
        from training.data import VOICES
        from training.talker import Script

        voices = [self.data.speakers.tolist().index(speaker) for speaker in VOICES.values()]
        numbers = self.data.wave_numbers(False)
        numbers = numbers[np.isin(self.data.wave_speakers[numbers], voices)]
        codes = codec.codes_of(encoder, self.model.code2wav, self.data, numbers)
        quiet = codec.silence(encoder, self.model.code2wav)
        return Script(self.data, dict(zip(numbers.tolist(), codes, strict=True)), quiet, self.config, self.options.seed)

    def heard(self) -> tuple[Any, Any]:
        from training import codec, judge

        listener = judge.Judge().to(self.device).eval()
        encoder = codec.Encoder(self.config["code2wav_config"]["hidden_size"]).to(self.device).eval()
        self.load("judge", listener)
        self.load("encoder", encoder)
        self.load("code2wav", self.model.code2wav)
        return listener, encoder

    def talker(self) -> None:
        from training import talker

        _, encoder = self.heard()
        self.load("thinker", self.model.thinker)
        script = self.script(encoder)
        batches = self.batches(SPEECH_TASKS, max(8, self.options.rows // 2), script)
        talker.train(self.model, self.data, batches, self.clock_of("talker", 2e-3), self.options.seed)
        self.save("talker", self.model.talker)

    def examine(self) -> None:
        import torch
        from safetensors.torch import save_file

        from training import export, talker, thinker
        from training.conversations import batch

        listener, encoder = self.heard()
        self.load("thinker", self.model.thinker)
        self.load("talker", self.model.talker)
        export.write(self.model, self.options.out)
        helpers = {f"judge.{name}": value for name, value in listener.state_dict().items()}
        helpers |= {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
        save_file(
            {name: value.half().contiguous().cpu() for name, value in helpers.items()},
            self.options.out / "helpers.safetensors",
        )
        # From here on the weights are what was written: BF16.
        self.model.load_state_dict({name: value.bfloat16().float() for name, value in self.model.state_dict().items()})
        script, author = self.script(encoder), self.author(True, 11)
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
            results[stage] = json.loads((self.work / f"results.{stage}.json").read_text())
        results["parameters"] = sum(one.numel() for one in self.model.parameters())
        (self.options.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        self.log(json.dumps({name: results[name] for name in ("thinker in BF16", "speech, sampled", "speech, greedy")}))

    def run(self) -> None:
        asked = self.options.stage
        if asked:
            for stage in STAGES:
                if stage in asked:
                    getattr(self, stage)()
            return
        done = {"codec": "code2wav.pt", "thinker": "thinker.pt", "talker": "talker.pt"}
        left = {stage for stage, file in done.items() if not (self.work / file).exists()}
        beside = None
        if "codec" in left:
            # A process of its own: both stages wait for Python more than for the device.
            command = [sys.executable, "-m", "training", *sys.argv[1:], "--stage", "codec"]
            beside = subprocess.Popen(command)
        if "thinker" in left:
            self.thinker()
        if beside is not None and beside.wait():
            raise SystemExit("the stage codec failed")
        if "talker" in left:
            self.talker()
        self.examine()


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
