"""Receipts of the doctor as a person reads them in a terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from omnifp4.doctor.fit import gb
from omnifp4.receipt.base import Verdict
from omnifp4.receipt.diagnosis import DiagnosisReceipt, Explanation, Outcome, StructureReport
from omnifp4.receipt.doctor import Ability, CheckpointSummary, Concern, DoctorReceipt, EngineRow, Fit, Machine, Severity

ABILITY_STYLES = {Ability.CAN: "green", Ability.CANNOT: "bold red", Ability.NOT_KNOWN: "yellow"}
SEVERITY_STYLES = {Severity.PROBLEM: "bold red", Severity.NOTE: "yellow"}
SCENARIOS = {"A": "reads both", "B": "reads the original only", "C": "reads neither"}


def doctor_text(receipt: DoctorReceipt) -> RenderableType:
    """Environment, checkpoint, engines, memory, verdict."""
    parts: list[RenderableType] = [_machine_text(receipt.machine), _tools_text(receipt)]
    parts += _concern_lines(receipt.environment_concerns)
    if receipt.checkpoint is not None:
        parts += [Text(), _checkpoint_text(receipt.checkpoint)]
        parts += _concern_lines(receipt.concerns)
    if receipt.engines:
        parts += [Text(), _engine_table(receipt.engines)]
        parts += [Text.assemble((f"{row.engine}: ", "bold"), row.command) for row in receipt.engines]
    if receipt.fit is not None:
        parts += [Text(), fit_text(receipt.fit)]
    parts += [Text(), Text(receipt.verdict, style="green" if receipt.can_run else "bold red")]
    return Group(*parts)


def _machine_text(machine: Machine) -> Text:
    lines = [
        f"Python {machine.python} on {machine.system} {machine.machine}, {machine.cores} core(s), "
        f"RAM {gb(machine.ram_bytes)}, {gb(machine.ram_free_bytes)} free"
    ]
    for gpu in machine.accelerators:
        free = f", {gb(gpu.free_bytes)} free" if gpu.free_bytes is not None else ""
        capability = f", compute capability {gpu.compute_capability}" if gpu.compute_capability else ""
        driver = f", driver {gpu.driver}" if gpu.driver else ""
        lines.append(f"{gpu.name}: {gb(gpu.memory_bytes)}{free}{capability}{driver}")
    if not machine.accelerators:
        lines.append("no GPU")
    return Text("\n".join(lines))


def _tools_text(receipt: DoctorReceipt) -> Text:
    here = [
        f"{tool.name} {tool.version}" + (f" ({tool.note})" if tool.note else "")
        for tool in receipt.tools
        if tool.version
    ]
    lacking = [tool.name for tool in receipt.tools if not tool.version]
    build = f" (torch: {receipt.machine.torch_build} build)" if receipt.machine.torch_build else ""
    return Text(f"installed: {', '.join(here) or 'none'}{build}\nnot installed: {', '.join(lacking) or 'none'}")


def _concern_lines(concerns: Iterable[Concern]) -> list[Text]:
    return [
        Text.assemble(
            (f"{concern.severity.value}: ", SEVERITY_STYLES[concern.severity]),
            concern.finding,
            f"\n  fix: {concern.fix}" if concern.fix else "",
        )
        for concern in concerns
    ]


def _checkpoint_text(summary: CheckpointSummary) -> Text:
    what = summary.kind if not summary.dialect else f"{summary.kind}, {summary.dialect}, {summary.activations}"
    parts = ", ".join(f"{name} {gb(size)}" for name, size in summary.parts.items())
    lines = [
        f"{summary.model}: {summary.model_type or 'unknown model type'}, {what}, {gb(summary.weight_bytes)} of weights"
        + (f" ({parts})" if parts else "")
        + (f", {summary.fp4_share:.1%} of parameters in FP4" if summary.fp4_share else "")
    ]
    failed = [check for check in summary.checks if check.verdict is Verdict.FAIL]
    for check in failed:
        lines.append(f"- {check.title}: {check.summary}" + (f" (fix: {check.fix})" if check.fix else ""))
    sound = "sound, as far as names, shapes and config tell; omnifp4 verify reads the values"
    lines.append(f"structure: {f'{len(failed)} check(s) failed' if failed else sound}")
    return Text("\n".join(lines))


def _engine_table(rows: Iterable[EngineRow]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("engine", "installed", "here", "this checkpoint", "why"):
        table.add_column(column)
    for row in rows:
        why = "\n".join(f"- {reason}" for reason in row.reasons) + (f"\nfix: {row.fix}" if row.fix else "")
        scenario = f"\n{row.scenario}: {SCENARIOS[row.scenario]}" if row.scenario else ""
        table.add_row(
            row.engine,
            row.version or "no",
            Text(row.ability.value, style=ABILITY_STYLES[row.ability]),
            Text(row.artifact.value + scenario, style=ABILITY_STYLES[row.artifact]),
            escape(why),
        )
    return table


def fit_text(fit: Fit) -> RenderableType:
    """Which context and batch fit, by loaded parts and device; the tiers; the rule."""
    table = Table(title="what fits", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("loaded", "weights", "device", "batch", "longest context", "needs"):
        table.add_column(column, justify="left" if column in ("loaded", "device") else "right")
    for row in fit.rows:
        tokens = f"{row.most_tokens:,}" if row.most_tokens else Text("does not fit", style="bold red")
        table.add_row(
            row.loaded,
            gb(row.weight_bytes),
            f"{row.device}, {gb(row.device_bytes)}",
            str(row.batch),
            tokens,
            gb(row.needed_bytes),
        )
    lines = [
        f"{tier.loaded}: {tier.weight_bytes / 2**30:.1f} GiB of weights, {tier.tier}; smallest usual device: "
        + (f"{tier.smallest_device_gb} GB" if tier.smallest_device_gb else "none")
        for tier in fit.tiers
    ]
    return Group(table, Text("\n".join([*lines, *fit.rule])))


def diagnosis_text(receipt: DiagnosisReceipt) -> RenderableType:
    """What happened, why, and what to change."""
    how = f"{receipt.outcome.value} after {receipt.seconds:.1f} s"
    how += f" with status {receipt.exit_status}" if receipt.exit_status is not None else ""
    parts: list[RenderableType] = [
        Text(f"{receipt.script}: {how}", style="green" if receipt.healthy else "bold red"),
        *(_explanation_text(item) for item in receipt.explanations),
    ]
    if receipt.structure is not None:
        parts.append(_structure_text(receipt.structure))
    if receipt.cat.calls:
        parts.append(Text(f"torch.cat: {receipt.cat.calls:,} calls, {receipt.cat.empty:,} with an empty list"))
    for row in receipt.calls:
        parts.append(Text(f"{row.model}: {row.calls:,} calls, {row.failed:,} failed"))
    if receipt.outcome is Outcome.STALLED and receipt.stack:
        parts.append(Text("where it stood:\n" + "\n".join(f"  {line}" for line in receipt.stack)))
    if receipt.fit is not None:
        parts.append(fit_text(receipt.fit))
    if receipt.healthy:
        parts.append(Text("nothing was found to be wrong", style="green"))
    return Group(*parts)


def _explanation_text(item: Explanation) -> Text:
    text = Text.assemble("\n", (f"{item.severity.value}: ", SEVERITY_STYLES[item.severity]), (item.title, "bold"))
    text.append(f"  [{item.rule}]\n", style="dim")
    text.append(f"why: {item.cause}\n")
    for line in item.evidence:
        text.append(f"  seen: {line}\n")
    text.append("fix:\n" + "\n".join(f"  {line}" for line in item.fix.splitlines()))
    return text


def _structure_text(report: StructureReport) -> Text:
    attention = ", ".join(f"{name} {count}" for name, count in report.attention.items())
    dtypes = ", ".join(
        f"{dtype} {gb(size)}" for dtype, size in sorted(report.dtypes.items(), key=lambda item: -item[1])
    )
    stored = (
        ""
        if report.packed or not report.quantized_parameters
        else ", but stored wide: rounded at each use, nothing saved"
    )
    return Text(
        f"\n{report.model}: {report.modules:,} modules, {report.parameters / 1e6:,.1f} M parameters, "
        f"{report.quantized_share:.1%} quantized{stored}\n"
        f"memory: {dtypes}\nattention: {attention or 'none'}"
    )
