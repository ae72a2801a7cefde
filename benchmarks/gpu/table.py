"""Measurements as one table, and the checks on them. Plain Python: no GPU, no torch."""

from __future__ import annotations

import json
from pathlib import Path

OURS = ("cuda", "triton", "streamed")
COLUMNS = ("case", "direction", "runner", "median ms", "spread", "speed-up", "roofline", "kept MiB", "note")
FIELDS = {"case", "runner", "direction", "times_ms", "kept_bytes", "floor_ms", "error"}


def median(times: list[float]) -> float:
    ordered = sorted(times)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def spread(times: list[float]) -> float:
    """Half the distance between the quartiles, as a share of the median."""
    ordered = sorted(times)
    quarter = len(ordered) // 4
    return (ordered[-1 - quarter] - ordered[quarter]) / 2 / median(times)


def check(measurement: dict) -> None:
    """Raise ValueError unless this is a measurement as ``bench.py`` writes it."""
    if set(measurement) != FIELDS:
        raise ValueError(f"fields {sorted(set(measurement) ^ FIELDS)} missing or unknown")
    if (measurement["error"] is None) != bool(measurement["times_ms"]):
        raise ValueError("a measurement has either times or an error")


def rows(measurements: list[dict]) -> list[tuple[str, ...]]:
    """One row a measurement, in their order. The speed-up of our rows is over the best of the others."""
    best: dict[tuple[str, str], float] = {}
    for m in measurements:
        check(m)
        if m["error"] is None and m["runner"] not in OURS:
            key = (m["case"], m["direction"])
            best[key] = min(median(m["times_ms"]), best.get(key, float("inf")))
    table = []
    for m in measurements:
        head = (m["case"], m["direction"], m["runner"])
        if m["error"] is not None:
            table.append((*head, "-", "-", "-", "-", "-", m["error"]))
            continue
        ms, other = median(m["times_ms"]), best.get((m["case"], m["direction"]))
        gain = f"{other / ms:.2f}x" if m["runner"] in OURS and other is not None else "-"
        share = f"{m['floor_ms'] / ms:.0%}" if m["floor_ms"] else "-"
        kept = "-" if m["kept_bytes"] is None else f"{m['kept_bytes'] / 2**20:.1f}"
        table.append((*head, f"{ms:.4g}", f"{spread(m['times_ms']):.1%}", gain, share, kept, ""))
    return table


def markdown(measurements: list[dict]) -> str:
    """The table as text, columns aligned."""
    lines = [COLUMNS, *rows(measurements)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    text = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines]
    return "\n".join([text[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *text[1:]])


def read(folder: Path) -> list[dict]:
    """All measurements of a run, from its JSON lines."""
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.open()]
