"""The verdict of verify, check by check."""

from __future__ import annotations

from collections import Counter

from omnifp4.receipt.base import Verdict
from omnifp4.receipt.gathered import GatheredReceipt
from omnifp4.receipt.verification import VerificationReceipt
from omnifp4.report.figures import figure
from omnifp4.report.gathering import folder_name
from omnifp4.report.sections.base import Section, Table

TITLE = "Proof"
MOST_FINDINGS = 5


def proof_section(receipt: GatheredReceipt) -> Section:
    """What was checked from the files, and what was found."""
    proof = receipt.verification
    if proof is None:
        return Section("proof", TITLE, missing="omnifp4 verify OUT --against MODEL --json > verify.json")
    told = f"Verdict: {proof.verdict.value}. {counts(proof)}, {proof.dialect}, {proof.activations}"
    told += ", every tensor compared with the original." if proof.against else ", without the original to compare with."
    notes = ["Checked from the files alone, by code that shares nothing with the code that made them but the format."]
    if proof.relative_squared_error is not None:
        notes.append(
            f"Relative squared error of all FP4 weights against the original: {figure(proof.relative_squared_error)}."
        )
    rows = []
    for check in proof.checks:
        found = [check.summary, *check.findings[:MOST_FINDINGS]]
        if check.finding_count > MOST_FINDINGS:
            found.append(f"and {check.finding_count - MOST_FINDINGS:,} more")
        if check.fix:
            found.append(f"fix: {check.fix}")
        rows.append((check.name, check.verdict.value, check.title, _without_folders("; ".join(found), proof)))
    table = Table(
        "Checks",
        ("check", "verdict", "what it checks", "what was found"),
        tuple(rows),
        states=tuple(check.verdict.value for check in proof.checks),
        folded=proof.verdict is Verdict.PASS,
    )
    return Section("proof", TITLE, told, tables=(table,), notes=tuple(notes))


def _without_folders(text: str, proof: VerificationReceipt) -> str:
    """Text in which the artifact and its source are named by their last part: where they lie is nobody's business."""
    for path in (proof.artifact, proof.against or ""):
        if "/" in path.strip("/"):
            text = text.replace(path, folder_name(path))
    return text


def counts(proof: VerificationReceipt) -> str:
    """How many checks said what, such as ``18 pass, 1 not checked``."""
    found = Counter(check.verdict for check in proof.checks)
    return ", ".join(f"{found[verdict]} {verdict.value}" for verdict in Verdict if found[verdict])
