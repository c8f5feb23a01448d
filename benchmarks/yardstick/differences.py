# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Means over seeds with their standard errors, and differences between two arms seed by seed."""

import statistics


def paired(values: list[float]) -> dict[str, float]:
    """Mean, standard error and p-value of a two-sided t-test against 0, of differences between two arms for each seed."""
    from scipy import stats

    error = statistics.stdev(values) / len(values) ** 0.5
    p = 2 * stats.t.sf(abs(statistics.mean(values)) / error, len(values) - 1) if error else float("nan")
    return {"mean": statistics.mean(values), "error": error, "p": float(p)}


def with_error(values: list[float], digits: int | None = None) -> str:
    """`mean ± standard error` with `digits` decimals (by default 3, or 2 if the mean is at least 2); one value has no error."""
    if digits is None:
        digits = 2 if max(map(abs, values)) >= 2 else 3
    text = f"{statistics.mean(values):.{digits}f}"
    return text + (f" ± {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else "")


def difference(own: dict[int, dict], base: dict[int, dict], key: str, digits: int = 3) -> str:
    """The paired difference to the reference, with its standard error, p-value and number of seeds."""
    values = [own[seed][key] - base[seed][key] for seed in sorted(own) if seed in base]
    if len(values) < 2:
        return f"{values[0]:+.{digits}f} (one seed)" if values else "–"
    found = paired(values)
    p = "p < 0.001" if found["p"] < 0.001 else f"p {found['p']:.3f}"
    return f"{found['mean']:+.{digits}f} ± {found['error']:.{digits}f} ({p}, n {len(values)})"
