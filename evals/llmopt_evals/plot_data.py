"""From evidence to the verdict's plot data and levels."""

from __future__ import annotations

import numpy as np

from llmopt_evals.evidence import Evidence
from llmopt_evals.verdict import PlotData, PositionBucket, Summary, UnitPoint

_LOG10_LOW, _LOG10_HIGH, _BINS_A_DECADE = -12, 2, 5
_BUCKET = 64  # positions
_QUANTILES = (0.5, 0.9, 0.95, 0.99, 0.999, 1.0)


def plot_data(evidence: Evidence) -> PlotData:
    """Histogram, quantiles, units and position buckets. Values off the axis go to the end bins."""
    bins = (_LOG10_HIGH - _LOG10_LOW) * _BINS_A_DECADE
    edges = np.linspace(_LOG10_LOW, _LOG10_HIGH, bins + 1)
    floor = 10.0**_LOG10_LOW
    logs = np.log10(np.clip(evidence.token_kl.astype(np.float64), floor, 10.0**_LOG10_HIGH))
    counts, _ = np.histogram(logs, bins=edges)
    quantiles = np.quantile(evidence.token_kl, _QUANTILES)
    return PlotData(
        kl_log10_edges=tuple(float(edge) for edge in edges),
        kl_counts=tuple(int(count) for count in counts),
        kl_quantiles={f"{q:g}": float(v) for q, v in zip(_QUANTILES, quantiles, strict=True)},
        units=_unit_points(evidence),
        positions=_position_buckets(evidence),
    )


def _unit_points(evidence: Evidence) -> tuple[UnitPoint, ...]:
    ratios = np.exp((evidence.nll_candidate - evidence.nll_reference) / evidence.tokens)
    return tuple(
        UnitPoint(
            name=name, num_tokens=int(tokens), perplexity_ratio=float(ratio), mean_kl=float(kl)
        )
        for name, tokens, ratio, kl in zip(
            evidence.names, evidence.tokens, ratios, evidence.kl / evidence.tokens, strict=True
        )
    )


def _position_buckets(evidence: Evidence) -> tuple[PositionBucket, ...]:
    bucket = evidence.token_position // _BUCKET
    counts = np.bincount(bucket)
    sums = np.bincount(bucket, weights=evidence.token_kl)
    return tuple(
        PositionBucket(
            start=i * _BUCKET,
            stop=(i + 1) * _BUCKET,
            num_tokens=int(count),
            mean_kl=float(sums[i] / count),
        )
        for i, count in enumerate(counts)
        if count
    )


def summary(evidence: Evidence) -> Summary:
    """Perplexities, cloze accuracies and the baseline's KL."""
    tokens, items = evidence.tokens.sum(), evidence.items.sum()
    return Summary(
        reference_perplexity=float(np.exp(evidence.nll_reference.sum() / tokens)),
        candidate_perplexity=float(np.exp(evidence.nll_candidate.sum() / tokens)),
        reference_cloze_accuracy=(
            float(evidence.reference_correct.sum() / items) if items else None
        ),
        candidate_cloze_accuracy=(
            float(evidence.candidate_correct.sum() / items) if items else None
        ),
        baseline_mean_kl=(
            None if evidence.kl_baseline is None else float(evidence.kl_baseline.sum() / tokens)
        ),
    )
