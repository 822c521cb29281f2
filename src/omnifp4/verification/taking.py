"""What the config says of every linear, beside what its tensor is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from omnifp4.checkpoint.dialects import COMPRESSED_TENSORS, MODELOPT
from omnifp4.formats.scheme import Scheme
from omnifp4.models import Part
from omnifp4.verification.claims import AUTO_ROUND
from omnifp4.verification.findings import Findings
from omnifp4.verification.matching import bad_patterns, said_schemes
from omnifp4.verification.subject import Subject, is_readable

KNOWN_DIALECTS: Final = (MODELOPT.name, COMPRESSED_TENSORS.name, AUTO_ROUND)
MEND_IGNORE: Final = "omnifp4 repair IN OUT writes the ignore list that fits the tensors"


@dataclass(frozen=True)
class Taking:
    """The config's word on every linear of the layout, by checkpoint names.

    Attributes:
        present: every linear of the layout that is there, alone or inside a 3-D tensor of experts.
        known: whether there is a config whose rules are known.
        taken: modules that it says are quantized, and as what; None for a scheme that is unknown here.
        claimed_but_wide: of those, the ones stored wide although their component is FP4 elsewhere or by default.
        unnamed_wide: the other ones stored wide: `ignore` fails to name them.
        ignored: quantized modules that it says are not.
        mistaken: quantized modules of another scheme than it says.
    """

    present: tuple[str, ...]
    known: bool
    taken: Mapping[str, Scheme | None]
    claimed_but_wide: tuple[str, ...]
    unnamed_wide: tuple[str, ...]
    ignored: tuple[str, ...]
    mistaken: tuple[str, ...] = ()


def read_taking(subject: Subject) -> Taking:
    """Ask the config about every linear of the layout that the checkpoint has."""
    claim, present = subject.claim, tuple(_present_linears(subject))
    if claim is None or claim.dialect not in KNOWN_DIALECTS:
        return Taking(present, False, {}, (), (), ())
    modules = list(dict.fromkeys([*present, *subject.quantized]))
    taken = said_schemes(claim, subject.mixed_layers, modules)
    quantized_components = {
        spec.component for module in subject.quantized if (spec := subject.linear_specs.get(module)) is not None
    }
    claimed: list[str] = []
    unnamed: list[str] = []
    for module in present:
        if module in taken and module not in subject.quantized:
            spec = subject.linear_specs[module]
            expected = is_readable(spec) and (
                spec.component.part is Part.THINKER or spec.component in quantized_components
            )
            (claimed if expected else unnamed).append(module)
    ignored = tuple(module for module in subject.quantized if module not in taken)
    mistaken = tuple(m for m, scheme in subject.quantized.items() if m in taken and taken[m] is not scheme)
    return Taking(present, True, taken, tuple(claimed), tuple(unnamed), ignored, mistaken)


def check_ignore(subject: Subject, taking: Taking) -> Findings:
    """``ignore``: by checkpoint names, the config excludes every wide linear and no quantized one."""
    found = Findings("ignore", "ignore names exactly what is not quantized", fix=MEND_IGNORE)
    claim = subject.claim
    if claim is None or not taking.known:
        found.unchecked = "there is no quantization_config" if claim is None else f"unknown rules of {claim.dialect!r}"
        return found
    if not subject.quantized:
        found.unchecked = "no tensor is FP4"
        return found
    for entry in bad_patterns(claim.ignore) if claim.dialect == COMPRESSED_TENSORS.name else ():
        found.add(f"entry {entry!r} is no regular expression")
    for module in taking.ignored:
        found.add(f"{module}: {called(subject.quantized[module])}, but the config says it is not quantized")
    by_component: dict[str, list[str]] = {}
    for module in taking.unnamed_wide:
        by_component.setdefault(subject.linear_specs[module].component.name, []).append(module)
    for component, modules in by_component.items():
        found.add(f"{component}: {len(modules):,} wide linears are not ignored, as {modules[0]}", len(modules))
    wide = sum(module not in subject.quantized for module in taking.present)
    count = f"{len(subject.quantized):,} {'quantized' if subject.coded else 'FP4'}"
    found.passed = f"{len(claim.ignore):,} entries exclude all {wide:,} wide linears and none of {count}"
    if subject.mixed_layers:
        found.passed = f"quantized_layers names the {count} linears and none of {wide:,} wide ones"
    found.failed = f"{found.count:,} linears would be read as what they are not"
    if claim.dialect == COMPRESSED_TENSORS.name and taking.unnamed_wide:
        globs = [entry for entry in claim.ignore if "*" in entry and not entry.startswith("re:")]
        if globs:
            found.notes.append(
                f"in compressed-tensors a wildcard such as {globs[0]!r} matches nothing; write re: and a pattern"
            )
    if claim.dialect == MODELOPT.name and any(entry.startswith("re:") for entry in claim.ignore):
        found.notes.append("ModelOpt's ignore has wildcards, no re: expressions: those match nothing")
    return found


def called(scheme: Scheme | None) -> str:
    """What findings call a scheme."""
    if scheme is None:
        return "of a scheme that is unknown here"
    return "FP4" if scheme is Scheme.NVFP4 else scheme.value.upper()


def check_schemes(subject: Subject, taking: Taking) -> Findings | None:
    """``config.schemes``: every quantized linear is of the scheme that the config says; None where there is only NVFP4."""
    if not subject.coded:
        return None
    found = Findings(
        "config.schemes", "the config says of each linear what it is", fix="quantize again: omnifp4 quantize MODEL OUT"
    )
    if not taking.known:
        found.unchecked = "there is no quantization_config whose rules are known"
        return found
    for module in taking.mistaken:
        said, scheme = taking.taken[module], subject.quantized[module]
        found.add(f"{module}: the config says {called(said)}, its tensors are {called(scheme)}")
    counts = ", ".join(f"{count:,} {scheme}" for scheme, count in subject.linears_by_scheme.items())
    found.passed = f"linears by scheme: {counts}"
    found.failed = f"{found.count:,} linears would be read as another scheme than they are"
    return found


def _present_linears(subject: Subject) -> list[str]:
    tensors = subject.checkpoint.tensors
    fused = {subject.layout.fused_by_name[name].expert_prefix for name in subject.layout.fused_names if name in tensors}
    return [
        module
        for module, spec in subject.linear_specs.items()
        if spec.name in tensors or module in subject.quantized or (fused and module.rsplit(".", 2)[0] in fused)
    ]
