"""Receipts with figures made up for tests: every kind, with everything in it that a report shows."""

from __future__ import annotations

from omnifp4.receipt.base import Environment, Verdict
from omnifp4.receipt.bench import (
    BenchMachine,
    BenchMemory,
    BenchReceipt,
    BenchSettings,
    DecodeRow,
    Measured,
    PrefillRow,
    RatioRow,
    SpeechRow,
    Spread,
    Tier,
    TierVerdict,
    Traffic,
)
from omnifp4.receipt.calibration import CalibrationReceipt, Cause, ExpertTokens, SampleFailure
from omnifp4.receipt.comparison import (
    ArtifactComparison,
    ComparisonReceipt,
    Finding,
    ModalityDifference,
    SpeechDifference,
    TaskDifference,
)
from omnifp4.receipt.evaluation import (
    Divergence,
    Estimate,
    EvaluationReceipt,
    Gate,
    LayerDifference,
    ModalityResult,
    Recognition,
    SpeechFloor,
    SpeechResult,
    TaskResult,
)
from omnifp4.receipt.sensitivity import SensitivityReceipt, SensitivityRow

ENVIRONMENT = Environment(
    omnifp4="0.1.0", python="3.11.7", numpy="2.0", machine="x86_64", system="Linux", made_at="2026-01-02T03:04:05+00:00"
)


def estimate(value: float, spread: float = 0.1) -> Estimate:
    return Estimate(value=value, low=value * (1 - spread), high=value * (1 + spread))


def _divergence(kl: float, top1: float) -> Divergence:
    return Divergence(
        kl_mean=estimate(kl), kl_median=kl / 3, kl_p90=2 * kl, kl_p99=9 * kl, kl_max=40 * kl,
        top1_agreement=Estimate(value=top1, low=top1 - 0.004, high=top1 + 0.003), perplexity=8.1,
        perplexity_ratio=estimate(1.01, 0.01), non_finite=0,
    )  # fmt: skip


def evaluation(model: str = "/home/somebody/out/tiny-omni-nvfp4") -> EvaluationReceipt:
    kinds = (("text", 0.012, 0.973), ("image", 0.0083, 0.981), ("audio", 0.031, 0.962))
    return EvaluationReceipt(
        model=model, against="/home/somebody/tiny-omni", model_type="qwen3_omni_moe", data="bundled",
        data_sha256="ab" * 32, samples=600, dtype="bfloat16", device="cpu", attention="sdpa", segmented=(),
        noise_floor="the reference with eager attention", distributions="full", reference_cached=0, seed=0,
        resamples=2000,
        modalities=tuple(
            ModalityResult(
                modality=name, samples=200, positions=4321, reference_perplexity=7.9, model=_divergence(kl, top1),
                floor=_divergence(2e-5, 0.99),
            )
            for name, kl, top1 in kinds
        ),
        tasks=(
            TaskResult(
                task="spoken digit", modality="audio", samples=300, reference=0.98, model=0.97, floor=0.98,
                difference=Estimate(value=-0.01, low=-0.02, high=0.004), lost=4, gained=1,
            ),
        ),
        speech=SpeechResult(
            utterances=40, frames=900, code_agreement=estimate(0.81, 0.02), first_code_agreement=estimate(0.9, 0.01),
            code_kl_mean=estimate(0.02), long_utterances=9,
            drift=(estimate(0.01), estimate(0.015), estimate(0.02), estimate(0.03)), frames_ratio=1.01,
            recognition=Recognition(utterances=40, reference=0.95, model=0.94, difference=estimate(-0.01)),
            non_finite=0,
            floor=SpeechFloor(
                code_agreement=estimate(0.97), first_code_agreement=estimate(0.99), code_kl_mean=estimate(1e-5),
                drift=(estimate(1e-5), estimate(2e-5), estimate(3e-5), estimate(4e-5)), frames_ratio=1.0,
                recognition=Recognition(utterances=40, reference=0.95, model=0.95, difference=estimate(0.0)),
                non_finite=0,
            ),
        ),
        layers=(
            LayerDifference(
                layer=0, relative_error=0.01, cosine=0.999, routing_agreement=0.98, floor=1e-4, non_finite=0
            ),
        ),
        gates=(Gate(option="--max-kl", limit=0.05, value=0.031, where="audio", verdict=Verdict.PASS),),
        notes=(), verdict=Verdict.PASS, seconds=60, peak_memory_bytes=10**9, environment=ENVIRONMENT,
    )  # fmt: skip


def comparison() -> ComparisonReceipt:
    models = ("/home/somebody/out/sweep", "/home/somebody/out/importance-of-a-long-name", "/home/somebody/out/small")
    evaluations = tuple(map(evaluation, models))
    like = evaluations[0]
    findings = (None, Finding.NEARER, Finding.SAME)
    return ComparisonReceipt(
        against=like.against, model_type=like.model_type, baseline=models[0], data="bundled",
        data_sha256=like.data_sha256, samples=600, dtype="bfloat16", device="cpu", seed=0, resamples=2000,
        artifacts=tuple(
            _compared(model, finding, 0.03 * place) for place, (model, finding) in enumerate(zip(models, findings, strict=True))
        ),
        evaluations=evaluations, worth="nearer than sweep for more bytes: importance-of-a-long-name", notes=("12 intervals",),
        verdict=Verdict.NOT_CHECKED, seconds=60.0, environment=ENVIRONMENT,
    )  # fmt: skip


def _compared(model: str, finding: Finding | None, more: float) -> ArtifactComparison:
    shared = {"recipe": "nvfp4-importance", "rule": "sweep", "weight_bytes": 16_400_000, "bits_per_weight": 11.88}
    if finding is None:
        return ArtifactComparison(
            model=model, more_bytes=0.0, modalities=(), tasks=(), speech=None, finding=None, conclusion="the baseline",
            verdict=Verdict.NOT_CHECKED, **shared,
        )  # fmt: skip
    less = Estimate(value=-0.004, low=-0.006, high=-0.002)
    return ArtifactComparison(
        model=model, more_bytes=more, finding=finding, conclusion="worth it where the bytes are: KL 1.50x lower (text)",
        modalities=(
            ModalityDifference(
                modality="text", samples=232, positions=4_000, kl=0.008, baseline_kl=0.012, kl_difference=less,
                kl_times=estimate(0.67), top1_difference=estimate(0.01), floor=9e-4, finding=finding,
            ),
        ),
        tasks=(
            TaskDifference(
                task="picture digit", samples=130, baseline=0.98, artifact=0.99,
                difference=Estimate(value=0.01, low=-0.01, high=0.03), lost=0, gained=1, finding=Finding.SAME,
            ),
        ),
        speech=SpeechDifference(
            utterances=27, code_agreement=estimate(0.02), code_kl=less, floor=1e-3, finding=Finding.TOO_FEW
        ),
        verdict=Verdict.NOT_CHECKED, **shared,
    )  # fmt: skip


def calibration() -> CalibrationReceipt:
    failure = SampleFailure(sample="line 9", cause=Cause.MEDIA, layer=None, error="no file a.wav")
    return CalibrationReceipt(
        model="tiny-omni", model_type="qwen3_omni_moe", model_fingerprint="ef" * 32, data="bundled",
        data_sha256="ab" * 32, samples=128, failures=(failure, failure), left_out={},
        tokens={"text": 9000, "audio": 1234}, least_tokens=64,
        experts=tuple(
            ExpertTokens(
                experts=f"thinker.model.layers.{layer}.mlp.experts", tokens=(0, 7, 2000, 60 + layer),
                all_expert_tokens=256, too_few=2, data_free=0,
            )
            for layer in range(2)
        ),
        components={"thinker.experts": 96}, not_captured={"audio_tower": "stays wide"}, block_hessians=False,
        dtype="bfloat16", device="cpu", tensors={}, resumed_layers=0, seconds=9, peak_memory_bytes=10**9,
        environment=ENVIRONMENT,
    )  # fmt: skip


def sensitivity(layers: int = 5, experts: int = 8) -> SensitivityReceipt:
    rows = [
        _row(name, None, None, 0.02 + 0.03 * place)
        for place, name in enumerate(("thinker.attention", "thinker.experts"))
    ]
    for name in ("thinker.attention", "thinker.experts"):
        rows += [_row(name, layer, None, 0.001 * (1 + layer)) for layer in range(layers)]
    rows += [_row("thinker.experts", layer, expert, None) for layer in range(layers) for expert in range(experts)]
    return SensitivityReceipt(
        model="/home/somebody/out/tiny-omni-nvfp4", against="/home/somebody/tiny-omni", model_type="qwen3_omni_moe",
        recipe="nvfp4", rule="sweep", data="bundled", data_sha256="ab" * 32, samples=60, positions=700,
        dtype="bfloat16", device="cpu", noise_floor=1e-5, together=estimate(0.06), rows=tuple(rows), notes=(),
        seconds=30, environment=ENVIRONMENT,
    )  # fmt: skip


def _row(component: str, layer: int | None, expert: int | None, kl: float | None) -> SensitivityRow:
    seen = expert != 3
    return SensitivityRow(
        component=component, layer=layer, expert=expert, linears=3, parameters=10**6, weight_error=0.0069,
        output_error=0.004 * (1 + (expert or 0)) if seen else None, tokens=70 if seen else 0,
        kl_mean=None if kl is None else estimate(kl), share=None if kl is None else 0.4,
    )  # fmt: skip


def bench() -> BenchReceipt:
    return BenchReceipt(
        passed=True,
        machine=BenchMachine(
            device="a device", device_bytes=141 * 10**9, cores=16, copy_bytes_per_second=_spread(4.1e12),
            copied_bytes=10**9, torch="2.11", transformers="5.17", triton="3.6",
        ),
        settings=BenchSettings(
            engine="auto", parts="text", prefill=(1024,), batch=(1, 8), context=(64, 4096), new_tokens=64, repeats=5,
            cell_seconds=3, seed=0,
        ),
        model=_measured("/home/somebody/out/tiny-omni-nvfp4", "NVFP4: attention, experts; else BF16", 1.0),
        against=_measured("/home/somebody/tiny-omni", "BF16", 3.0),
        ratios=(RatioRow(figure="decode, batch 1", model=400, reference=133, ratio=3.0),),
        seconds=100, environment=ENVIRONMENT,
    )  # fmt: skip


def _spread(value: float) -> Spread:
    return Spread(median=value, least=0.98 * value, most=1.02 * value, repeats=5)


def _measured(model: str, weights: str, size: float) -> Measured:
    return Measured(
        model=model, weights=weights, layers=48, engine="modules", engine_reason="no GPU is here", load_seconds=4.2,
        make_seconds=None, checks=(), routing=(), cache=(),
        memory=BenchMemory(weights={}, weight_bytes=int(18e9 * size), loading_peak_bytes=None, peak_bytes=int(2e10)),
        traffic=Traffic(always=1, expert=1, layers=48, row=1, cache_token=1),
        prefill=(
            PrefillRow(
                prompt_tokens=1024, engine="modules", first_token_seconds=_spread(0.123), tokens_per_second=_spread(9e3)
            ),
        ),
        decode=tuple(
            DecodeRow(
                batch=batch, prompt_tokens=context, engine="modules", new_tokens=64, mean_context=context + 32.0,
                tokens_per_second=_spread(400 * batch / size), step_bytes=int(2e9 * size),
                bound_tokens_per_second=620 * batch / size, fraction=400 / 620,
            )
            for batch in (1, 8)
            for context in (64, 4096)
        ),
        speech=SpeechRow(
            audio_seconds=4, real_time_factor=_spread(0.3), first_sound_seconds=_spread(0.2), how="in one piece"
        ),
        tiers=(
            Tier(
                name="target", most_gib=20, least_tokens_per_second=100, gib=17.1 * size, parts="text",
                tokens_per_second=400, verdict=TierVerdict.PASS if size == 1 else TierVerdict.FAIL, reason="as measured",
            ),
        ),
    )  # fmt: skip
