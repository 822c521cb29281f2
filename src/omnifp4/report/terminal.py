"""Receipts as a person reads them in a terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from omnifp4.receipt.base import Verdict
from omnifp4.receipt.conversion import ConversionReceipt
from omnifp4.receipt.plan import ComponentRow, PlanReceipt
from omnifp4.receipt.quantization import QuantizationReceipt
from omnifp4.receipt.repair import Effect, RepairOutcome, RepairReceipt
from omnifp4.receipt.verification import VerificationReceipt
from omnifp4.report.figures import count_text, size_text

VERDICT_STYLES = {Verdict.PASS: "green", Verdict.FAIL: "bold red", Verdict.NOT_CHECKED: "yellow"}


def plan_text(plan: PlanReceipt) -> RenderableType:
    """Components before and after, sizes, and what stays wide and why."""
    table = Table(
        title=Text(f"{plan.model_type}: {plan.model}"), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for column in ("component", "scheme"):
        table.add_column(column, no_wrap=True)
    for column in ("tensors", "parameters", "before", "after"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in plan.components:
        style = "bold" if row.scheme != "bf16" else ""
        table.add_row(
            row.name, row.scheme, f"{row.tensors:,}", count_text(row.parameters), size_text(row.bytes_before),
            size_text(row.bytes_after), style=style,
        )  # fmt: skip
    table.add_section()
    table.add_row(
        "all", f"{plan.fp4_share:.1%} FP4{_eight_bit(plan.components)}", f"{plan.tensors:,}", count_text(plan.parameters),
        size_text(plan.weight_bytes_before), size_text(plan.weight_bytes_after),
    )  # fmt: skip
    lines = [
        "What stays wide, and why:",
        *(f"- {', '.join(names)}: {reason}" for reason, names in _reasons(plan).items()),
    ]
    wide = plan.output_format == "fake-quant"
    saved = "nothing shrinks" if wide else f"{plan.weight_bytes_before / plan.weight_bytes_after:.2f}x smaller"
    lines += [
        "",
        f"recipe {plan.recipe} (version {plan.recipe_version}), scale rule {plan.rule}, format {plan.output_format}",
        f"on disk {plan.weight_bytes_after:,} bytes of weights in {len(plan.shards)} shard(s): {saved}",
        f"in GPU memory {plan.gpu_bytes:,} bytes of weights ({plan.gpu_bytes / 2**30:.1f} GiB), all parts loaded",
    ]
    if plan.free_disk_bytes is not None:
        needed = plan.weight_bytes_after + (plan.side_file_bytes or 0)
        lines.append(
            f"free disk {plan.free_disk_bytes:,} bytes: {'enough' if plan.free_disk_bytes > needed else 'TOO LITTLE'}"
        )
    if plan.left_out:
        first, reason = next(iter(plan.left_out.items()))
        lines.append(f"{len(plan.left_out)} linear(s) of FP4 components stay wide, such as {first}: {reason}")
    lines += [f"note: {note}" for note in plan.notes]
    return Group(table, Text("\n".join(lines)))


def _eight_bit(rows: Iterable[ComponentRow]) -> str:
    """The share of parameters in FP8 and INT8, after a comma; empty where there are none."""
    rows = list(rows)
    # Receipts of earlier versions count what is FP4 alone.
    eight = sum(max(row.quantized_parameters, row.fp4_parameters) - row.fp4_parameters for row in rows)
    return f", {eight / sum(row.parameters for row in rows):.1%} 8-bit" if eight > 0 else ""


def _reasons(plan: PlanReceipt) -> dict[str, list[str]]:
    """Components by the reason why they, or some of their tensors, stay wide."""
    reasons: dict[str, list[str]] = {}
    for row in plan.components:
        if row.reason:
            reasons.setdefault(row.reason, []).append(row.name)
    return reasons


def quantization_text(receipt: QuantizationReceipt, out: str) -> RenderableType:
    """What was written, and how far it is from the original."""
    wide = receipt.output_format == "fake-quant"
    smaller = "" if wide else f" ({receipt.source.weight_bytes / receipt.weight_bytes:.2f}x smaller)"
    lines = [
        f"{out}: {size_text(receipt.weight_bytes)} of weights in place of {size_text(receipt.source.weight_bytes)}{smaller}, "
        f"{receipt.fp4_parameters / receipt.parameters:.1%} of parameters {'rounded to' if wide else 'in'} FP4"
        f"{_eight_bit(receipt.components)}",
        f"relative squared error {receipt.relative_squared_error:.2e} over {len(receipt.decisions):,} linears",
        f"{receipt.seconds:.1f} s on {receipt.threads} thread(s), peak memory {size_text(receipt.peak_memory_bytes)}",
    ]
    if receipt.left_out:
        first, reason = next(iter(receipt.left_out.items()))
        lines.append(f"{len(receipt.left_out)} linear(s) of FP4 components stay wide, such as {first}: {reason}")
    if wide:
        lines.append("fake-quant: the weights are rounded through their schemes and stay wide; nothing shrinks")
    return Text("\n".join(lines))


def verification_text(receipt: VerificationReceipt) -> RenderableType:
    """Checks with their verdicts, findings below the failed ones, and the verdict."""
    title = Text(f"{receipt.artifact}: {receipt.dialect}, {receipt.activations}")
    table = Table(title=title, title_justify="left")
    table.add_column("check")
    table.add_column("verdict")
    table.add_column("what was found")
    for check in receipt.checks:
        found = [check.summary, *(f"- {finding}" for finding in check.findings[:8])]
        if check.finding_count > 8:
            found.append(f"  … {check.finding_count - 8} more (--json has them)")
        if check.fix:
            found.append(f"fix: {check.fix}")
        table.add_row(
            check.name, Text(check.verdict.value, style=VERDICT_STYLES[check.verdict]), escape("\n".join(found))
        )
    tail = Text()
    if receipt.worst_tensors:
        tail.append(f"relative squared error {receipt.relative_squared_error or 0.0:.2e}; worst: ")
        tail.append(", ".join(f"{t.name} {t.relative_squared_error:.2e}" for t in receipt.worst_tensors[:3]) + "\n")
    others = "".join(f", {count:,} {name}" for name, count in receipt.schemes.items() if name not in ("nvfp4", "mxfp4"))
    tail.append(f"{receipt.fp4_linears:,} FP4 linears{others}, {receipt.compression_ratio:.2f}x smaller than wide, ")
    tail.append(f"checked in {receipt.seconds:.1f} s: ")
    tail.append(receipt.verdict.value.upper(), style=VERDICT_STYLES[receipt.verdict])
    return Group(table, tail)


def conversion_text(receipt: ConversionReceipt, out: str) -> RenderableType:
    """What was converted, and how exactly."""
    lines = [
        f"{out}: {receipt.fp4_linears:,} FP4 linears from {receipt.from_format} to {receipt.to_format}, codes and block "
        f"scales unchanged; {size_text(receipt.weight_bytes)} of weights",
        f"tensor scales: {receipt.exact_tensor_scales:,} exact, {receipt.nudged_tensor_scales:,} moved by one float32 unit "
        "so that weights decode alike",
    ]
    if receipt.rounding_differs:
        lines.append(
            f"{len(receipt.rounding_differs):,} linears have weights that decode to the neighbouring BF16 number"
        )
    return Text("\n".join([*lines, *(f"note: {note}" for note in receipt.notes)]))


def repair_text(receipt: RepairReceipt, out: str) -> RenderableType:
    """Every damage with what was done about it, or what it would take."""
    lines = []
    for kind in dict.fromkeys(mend.kind for mend in receipt.mended):
        mends = [mend for mend in receipt.mended if mend.kind == kind]
        first = mends[0]
        more = f" (and {len(mends) - 1:,} more)" if len(mends) > 1 else ""
        effect = "" if first.effect is Effect.NONE else f" [weights {first.effect.value}]"
        lines.append(f"{kind}: {first.subject}{more}: {first.problem}; {first.action}{effect}")
    for lost in receipt.unmended[:20]:
        lines.append(f"CANNOT BE MENDED: {lost.kind}: {lost.subject}: {lost.problem}; needs {lost.needs}")
    if len(receipt.unmended) > 20:
        lines.append(f"… and {len(receipt.unmended) - 20:,} more that cannot be mended (--json has them)")
    ends = {
        RepairOutcome.MENDED: f"{out}: mended",
        RepairOutcome.NOTHING_TO_MEND: "nothing to mend; no OUT was made",
        RepairOutcome.NOT_MENDED: f"not mended; {out} was not made",
    }
    return Text("\n".join([*lines, ends[receipt.outcome]]))
