"""``python -m training``: prepares the data, trains the tiny omni model, examines it.

    python -m training prepare --recordings FSDD/recordings --text A.txt B.txt --out .train/data.npz
    python -m training train --data .train/data.npz --out OUT
    python -m training train --data .train/data.npz --out OUT --from BEFORE       # goes on from an earlier result
    python -m training train --data .train/data.npz --out OUT --stage talker      # one stage again
    python -m training train --data .train/data.npz --out OUT --from BEFORE --stage eye --stage examine
    python -m training card --data .train/data.npz --results OUT/results.json       # tables for the model card
    python -m training forms --data .train/data.npz --checkpoint FOLDER             # digits in other forms, as a user asks

Five stages. ``codec`` (with the judge) runs beside ``thinker`` and ``eye``, which trains the thinker's vision tower alone;
``talker`` needs all three; ``examine`` writes the checkpoint and its results. A stage that was interrupted goes on where it
was; one that is done is not run again unless it is named. A stage that is named takes what it needs of the others from this
run or, where this run has none, from the earlier result.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence

from training.options import STAGES, parser


def main(arguments: Sequence[str] | None = None) -> None:
    begun = time.monotonic()
    options = parser().parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if options.verb == "prepare":
        from training import data

        data.prepare(options.recordings, options.text, data.tokenizer(), options.out)
        print(f"{options.out}: {options.out.stat().st_size / 1e6:.1f} MB")
        return
    if options.verb == "card":
        from training import card, data

        print("\n".join(card.tables(json.loads(options.results.read_text()), data.load(options.data))))
        return
    if options.verb == "forms":
        from training import data, forms

        for name, right, asked in forms.examine(options.checkpoint, data.load(options.data), options.every):
            print(f"| {name} | {right}/{asked} | {right / asked:.1%} |", flush=True)
        return
    from training.order import Order
    from training.stages import Run

    run = Run(options, begun)
    if not options.stage:
        Order(run).go()
        return
    if options.on_call:
        _ = run.built
        called = sys.stdin.readline().split()
        if not called:
            raise SystemExit(f"{options.stage[0]}: the run that this stage belongs to has ended")
        run.begun, run.pace = map(float, called)
    for stage in STAGES:
        if stage in options.stage:
            getattr(run, stage)()


if __name__ == "__main__":
    main()
