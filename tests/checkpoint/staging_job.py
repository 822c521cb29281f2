"""A job of many small units, to be killed: ``python staging_job.py OUT``."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

from omnifp4.checkpoint.dialects.base import StoredTensor
from omnifp4.checkpoint.output import OutputWriter, plan_output, write_json
from omnifp4.checkpoint.staging import Staging

JOB = {"source": "abc", "recipe": "nvfp4", "shards": [1, 2]}
UNITS = 40
PAUSE_S = 0.001


def run(out: Path) -> tuple[int, int]:
    """Make OUT, or go on making it: numbers of units that were there, and that were done."""
    planned = plan_output([[StoredTensor(f"unit.{number}", "U8", (3000 + number,))] for number in range(UNITS)], 30000)
    there = done = 0
    with Staging(out, JOB, resume=True) as staging, OutputWriter(staging.folder, planned) as writer:
        print("begun", flush=True)
        for number in range(UNITS):
            name = f"unit.{number}"
            if name in staging.finished and staging.finished[name]["crc"] == writer.checksum(name):
                there += 1
                continue
            time.sleep(PAUSE_S)
            data = np.random.default_rng(number).integers(0, 256, 3000 + number, dtype=np.uint8)
            staging.record(name, {"crc": writer.write(name, data)})
            done += 1
        write_json(staging.folder / "index.json", planned.index())
        writer.sync()
        staging.commit()
    return there, done


if __name__ == "__main__":
    print(*run(Path(sys.argv[1])), flush=True)
