"""Where every figure comes from."""

from __future__ import annotations

from omnifp4.receipt.base import Environment, Record
from omnifp4.receipt.gathered import GatheredReceipt
from omnifp4.report.sections.base import Section, Table

TITLE = "Provenance"


def provenance_section(receipt: GatheredReceipt) -> Section:
    """Source, recipe, versions, machines, dates and hashes."""
    made = receipt.quantization
    facts = [("model", receipt.model), ("model type", receipt.model_type)]
    if made:
        facts += [
            ("source's commit", made.source.revision or "local folder"),
            ("source's config and headers, SHA-256", made.source.headers_sha256),
        ]
    if source := made or receipt.plan:
        facts += [
            ("recipe", f"{source.recipe}, version {source.recipe_version}, scale rule {source.rule}"),
            ("format", source.output_format),
        ]
        facts += [(f"override of {name}", scheme) for name, scheme in source.overrides.items()]
    for change in made.changes if made else ():
        facts.append(("changed later by", str(change.get("receipt", "unknown"))))
    files = Table(
        "Receipts",
        ("receipt", "kind", "made", "omnifp4", "machine", "SHA-256"),
        tuple(
            (file.name, file.receipt, *_origin(environments[file.receipt].pop(0)), file.sha256[:16])
            for environments in (_environments(receipt),)
            for file in receipt.files
        ),
    )
    return Section(
        "provenance",
        TITLE,
        f"Rendered by omnifp4 {receipt.environment.omnifp4} on {_day(receipt.environment.made_at)} from "
        f"{len(receipt.files)} receipt(s).",
        tables=(Table("Origin", ("what", "value"), tuple(facts)), files),
    )


def _environments(receipt: GatheredReceipt) -> dict[str, list[Environment]]:
    """Environments by kind of receipt, in the order of the files."""
    held: tuple[Record | None, ...] = (
        receipt.plan,
        receipt.calibration,
        receipt.quantization,
        receipt.verification,
        receipt.comparison,
        receipt.sensitivity,
        receipt.doctor,
        *receipt.evaluations,
        *receipt.harness,
        *receipt.benches,
        *receipt.server_loads,
    )
    found: dict[str, list[Environment]] = {}
    for record in held:
        if record is not None:
            found.setdefault(getattr(record, "receipt"), []).append(getattr(record, "environment"))  # noqa: B009
    return found


def _origin(environment: Environment) -> tuple[str, str, str]:
    machine = f"{environment.machine} {environment.system}, Python {environment.python}"
    return _day(environment.made_at), environment.omnifp4, machine


def _day(made_at: str) -> str:
    """Date and time to the minute."""
    return made_at[:16].replace("T", " ") + " UTC" if made_at.endswith("+00:00") else made_at
