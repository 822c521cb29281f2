"""What engines cannot read beside plain NVFP4: refused, converted or told, before anything runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from handover_machines import Heard, gpu, machine

from omnifp4.doctor.facts import Facts, read_facts
from omnifp4.doctor.reading import CAN, CANNOT, NOT_KNOWN, read_by_vllm, read_by_vllm_omni, unread_schemes
from omnifp4.errors import OmniFP4Error
from omnifp4.handover.options import Options
from omnifp4.handover.serving import Prepared, prepare

ENGINES = pytest.mark.parametrize("engine", ["vllm", "vllm-omni"])


def prepared(model: Path, engine: str, cache: Path) -> Prepared:
    return prepare(
        str(model), engine, Options(cache=cache), host="127.0.0.1", port=8000, print_only=True, output=Heard(),
        machine=machine(gpu()),
    )  # fmt: skip


@pytest.fixture(scope="module")
def branched(tiny_omni: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with low-rank branches, of attention alone and of one line of data."""
    pytest.importorskip("transformers")
    import omnifp4

    home = tmp_path_factory.mktemp("branched")
    recipe = {
        "name": "few-branches", "version": 1, "components": {"thinker.attention": "nvfp4"},
        "method": {"name": "svdquant", "rank": 2, "rounds": 1},
    }  # fmt: skip
    (home / "recipe.json").write_text(json.dumps(recipe))
    (home / "data.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "Repeat: 1 2 3"}]}) + "\n")
    omnifp4.quantize(
        tiny_omni, home / "svd", recipe=str(home / "recipe.json"), data=home / "data.jsonl", device="cpu", threads=1
    )
    return home / "svd"


@ENGINES
def test_svdquant_is_refused_with_what_to_do_instead(engine: str, branched: Path, tmp_path: Path) -> None:
    """Also in ModelOpt's form, where the head alone would have it converted."""
    with pytest.raises(OmniFP4Error) as caught:
        prepared(branched, engine, tmp_path)
    told = str(caught.value)
    assert "cannot read it: it is SVDQuant" in told
    assert f"omnifp4 serve {branched} runs it here" in told
    assert "--recipe nvfp4-gptq" in told
    assert "\n" not in told


def test_the_command_line_refuses_svdquant_in_one_line(branched: Path, tmp_path: Path) -> None:
    program = [sys.executable, "-m", "omnifp4"]
    serve = [*program, "serve", str(branched), "--engine", "vllm", "--print"]
    convert = [*program, "convert", str(branched), str(tmp_path / "out"), "--format", "compressed-tensors"]
    for command, instead in ((serve, "omnifp4 serve"), (convert, "quantize the wide model again")):
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith("error: ")
        assert "SVDQuant" in done.stderr
        assert instead in done.stderr
    assert list(tmp_path.iterdir()) == []


@ENGINES
def test_forms_that_vllm_does_not_read_are_converted(
    engine: str, mixed_artifacts: dict[str, Path], tmp_path: Path
) -> None:
    found = prepared(mixed_artifacts["modelopt"], engine, tmp_path)
    assert "mxfp4 linears (first talker.model.layers.0.self_attn." in found.converted_because
    assert "fp8 experts with a scale for each channel" in found.converted_because
    assert str(tmp_path / "converted") in found.command.shown()
    assert any("by hand: omnifp4 convert" in note for note in found.notes)


@ENGINES
def test_forms_that_it_reads_are_handed_over_and_the_version_is_told(
    engine: str, mixed_artifacts: dict[str, Path], tmp_path: Path
) -> None:
    """Without an environment the command is for the pinned vLLM 0.26, whose code was not read for these schemes."""
    found = prepared(mixed_artifacts["compressed-tensors"], engine, tmp_path)
    assert found.converted_because == ""
    (note,) = [note for note in found.notes if "was not read for them" in note]
    assert "linears in fp8, int8, mxfp4 are read by vLLM 0.32; vLLM 0.26.0" in note


def test_which_version_reads_what(mixed_artifacts: dict[str, Path], modelopt: Path) -> None:
    def abilities(facts: Facts, version: str) -> list[object]:
        return [ability for ability, _, _ in unread_schemes(facts, version)]

    mixed, other = (read_facts(str(mixed_artifacts[name])) for name in ("modelopt", "compressed-tensors"))
    assert abilities(mixed, "0.32.1") == [CANNOT]
    assert abilities(mixed, "0.33.0") == [NOT_KNOWN, NOT_KNOWN]
    assert abilities(mixed, "0.26.0") == [CANNOT, NOT_KNOWN]
    assert abilities(other, "0.32.1") == []
    assert abilities(other, "0.26.0") == [NOT_KNOWN]
    assert abilities(read_facts(str(modelopt)), "0.20.0") == []


def test_fp8_linears_alone_are_read_from_modelopts_form(tiny_omni: Path, tmp_path: Path) -> None:
    """vLLM-Omni 0.26 does not rename the names of mixed precision; a repair would not help, a conversion does."""
    import omnifp4

    artifact = tmp_path / "fp8"
    omnifp4.quantize(tiny_omni, artifact, components=["talker.attention=fp8"], threads=2)
    facts = read_facts(str(artifact))
    assert read_by_vllm(facts, (), "0.32").ability is CAN
    omni = read_by_vllm_omni(facts, (), "0.26")
    assert omni.ability is CANNOT
    (fix,) = [fix for ability, _, fix in omni.told if ability is CANNOT]
    assert fix.startswith("omnifp4 convert")
    assert prepared(artifact, "vllm-omni", tmp_path).converted_because.startswith("vLLM-Omni 0.26 does not rename")
