"""The usual aims of memory and speed for one sequence, judged."""

from __future__ import annotations

from typing import Final

from omnifp4.benchmark.parts import SPEECH_PARTS, parts_text
from omnifp4.receipt.bench import Tier, TierVerdict

TIERS: Final = (("minimum", 30.0, 2.0), ("target", 20.0, 5.0), ("optimal", 17.0, 10.0))
"""Name, GiB of the thinker path that weights must stay below, tokens a second that must be exceeded.

The optimal tier says "about 16 GB": 17 GiB, as `omnifp4.doctor` reads it.
"""


def judge_tiers(weights: dict[str, int], tokens_per_second: float | None, not_measured: str) -> tuple[Tier, ...]:
    """Judges each tier.

    Args:
        weights: bytes on the device by part; speech is not on the thinker path and is not counted.
        tokens_per_second: of one sequence at the shortest context; None if not measured.
        not_measured: why there is no speed, or why the whole is no measure; empty if it is one.
    """
    path = {part: size for part, size in weights.items() if part not in SPEECH_PARTS}
    gib = sum(path.values()) / 2**30
    speed = None if not_measured else tokens_per_second
    tiers = []
    for name, most_gib, least_speed in TIERS:
        if not_measured or speed is None:
            verdict, reason = TierVerdict.NOT_MEASURED, not_measured or "batch 1 was not measured"
            if gib >= most_gib and speed is None and not not_measured:
                verdict, reason = TierVerdict.FAIL, f"{gib:.1f} GiB is not below {most_gib:g}"
        elif gib >= most_gib:
            verdict, reason = TierVerdict.FAIL, f"{gib:.1f} GiB is not below {most_gib:g}"
        elif speed <= least_speed:
            verdict, reason = TierVerdict.FAIL, f"{speed:.1f} tok/s is not above {least_speed:g}"
        else:
            verdict, reason = TierVerdict.PASS, f"{gib:.1f} GiB and {speed:.0f} tok/s"
        tiers.append(
            Tier(
                name=name, most_gib=most_gib, least_tokens_per_second=least_speed, gib=gib, parts=parts_text(path),
                tokens_per_second=speed, verdict=verdict, reason=reason,
            )
        )  # fmt: skip
    return tuple(tiers)
