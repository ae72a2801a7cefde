"""What was verified and timed on this device: a table that ``auto`` looks up and ``shift-calibrate`` fills.

    identity   (device, driver, torch, triton, kernels)      one file each: a verdict holds for nothing else
    row        a shape class -> backend -> Verdict           specification, dtypes, direction, size buckets

Tables are looked for in the cache folder (``SHIFT_KERNELS_CACHE``, default ``~/.cache/shift_kernels``), then
among those shipped in ``shift_kernels/measured``. A backend without the verdict "verified" is never taken by
measurement, however fast it was.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from shift_kernels.call import Problem
from shift_kernels.errors import input_error
from shift_kernels.machine import device_name, version_of
from shift_kernels.torch_internals import constant_for_dynamo

VERIFIED, WRONG, CRASHED, TIMED_OUT = "verified", "wrong", "crashed", "timed out"
UNCHECKED = "unchecked"
"""It ran, but there is no memory for the references that it is held against."""
OUTCOMES = (VERIFIED, WRONG, CRASHED, TIMED_OUT, UNCHECKED)
SHIPPED = Path(__file__).with_name("measured")
HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What trying one backend on one shape came to.

    Args:
        outcome: one of :data:`OUTCOMES`.
        why: one line where it is not verified, else empty.
        worst_error: the largest error over that of the same-dtype reference, of results and gradients.
        ms: median milliseconds of a call (with its backward where the class has gradients).
        compile_s: seconds that the first call took longer.
    """

    outcome: str
    why: str = ""
    worst_error: float | None = None
    ms: float | None = None
    compile_s: float | None = None

    def __str__(self) -> str:
        if self.outcome == VERIFIED:
            return f"verified (error {self.worst_error:.2g} of the reference's), {self.ms:.3g} ms"
        return f"{self.outcome}: {self.why}"


Row = Mapping[str, Verdict]
"""Backend -> what trying it came to."""


def shape_class(problem: Problem) -> str:
    """The row that a problem belongs to: sizes count by their bucket, the next power of two.

    Raises:
        ShiftInputError: the problem does not know its number of loops.
    """
    if problem.n_loops is None:
        raise input_error("shape_class", "problem.n_loops", None, "an int", "Say for which T.")
    return _shape_class(*_facts(problem), bucket(problem.n_loops))


Facts = tuple[str, torch.dtype, torch.dtype, torch.device, bool, bool, int, int]


def _facts(problem: Problem) -> Facts:
    """What a row is found by besides T, as constants: torch.compile may hold sizes as symbols."""
    p = problem
    kind = (p.spec.key, p.dtype, p.compute_dtype, p.device, p.grad, p.halting)
    return *kind, bucket(p.batch), bucket(p.seq_len)


def _shape_class(
    spec: str,
    dtype: torch.dtype,
    compute_dtype: torch.dtype,
    device: torch.device,
    grad: bool,
    halting: bool,
    batch: int,
    seq_len: int,
    n_loops: int,
) -> str:
    parts = [spec, f"{_name(dtype)} with products in {_name(compute_dtype)}"]
    parts += ["forward and backward" if grad else "forward", *(["halting"] if halting else [])]
    parts += [f"batch <= {batch}, seq_len <= {seq_len}, n_loops <= {n_loops}"]
    return "; ".join([*parts, f"{torch.get_num_threads()} threads"] if device.type == "cpu" else parts)


def describe(problem: Problem) -> str:
    """A problem in one line, for progress."""
    p = problem
    dtypes = " with products in ".join(dict.fromkeys([_name(p.dtype), _name(p.compute_dtype)]))
    direction = "forward and backward" if p.grad else "forward"
    return (
        f"[{p.batch}, {p.seq_len}, {p.spec.d_model}] {dtypes}, n_loops {p.n_loops}, {direction}, {p.device}"
    )


def bucket(size: int) -> int:
    """The smallest power of two that is not below ``size`` (1 for 0)."""
    return next(1 << k for k in range(64) if size <= 1 << k)


def lookup(problem: Problem) -> Row | None:
    """The row of the problem's shape class on this machine's device, or None where it was not measured."""
    return _lookup(_facts(problem), problem.n_loops)


def fastest_first(problem: Problem) -> tuple[str, ...]:
    """Backends verified for the problem's shape class, the fastest first; none where it was not measured."""
    # Sizes are looked at only where there is a table: torch.compile would compile for each power of two.
    return _fastest_first(_facts(problem), problem.n_loops) if _has_table(problem.device) else ()


@constant_for_dynamo
def _has_table(device: torch.device) -> bool:
    """Cheap: no versions, no hashes."""
    slug = _slug(device_name(device))
    return bool(_adopted) or any(any(folder.glob(f"{slug}-*.json")) for folder in (cache_folder(), SHIPPED))


@constant_for_dynamo
def _fastest_first(facts: Facts, n_loops: int | None) -> tuple[str, ...]:
    row = _lookup(facts, n_loops) or {}
    right = {name: v.ms for name, v in row.items() if v.outcome == VERIFIED and v.ms is not None}
    return tuple(sorted(right, key=right.__getitem__))


def _lookup(facts: Facts, n_loops: int | None) -> Row | None:
    device = facts[3]
    tables = [_adopted, *(map(_rows_of, _paths(device)) if _has_table(device) else ())]
    # T that is data on a device is taken for the largest that was measured.
    loops = [1 << k for k in range(16, -1, -1)] if n_loops is None else [bucket(n_loops)]
    keys = [_shape_class(*facts, n) for n in loops]
    return next((rows[key] for rows in tables for key in keys if key in rows), None)


def record(problem: Problem, row: Row) -> Path:
    """Write the row of a problem's shape class into this user's table: atomically, beside what others write.

    Returns:
        The table's path.
    """
    from filelock import FileLock  # comes with torch

    path = table_path(problem.device)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        rows = {**_rows_of(path), shape_class(problem): dict(row)}
        table = {
            "identity": identity(problem.device),
            "rows": {key: {b: dataclasses.asdict(v) for b, v in r.items()} for key, r in rows.items()},
        }
        new = path.with_suffix(f".{os.getpid()}.new")
        new.write_text(json.dumps(table, indent=1), encoding="utf-8")
        os.replace(new, path)
    forget()
    return path


_adopted: dict[str, Row] = {}


def adopt(rows: Mapping[str, Row]) -> None:
    """Take rows that another process measured, before any table's: how all ranks of a job choose alike."""
    _adopted.update(rows)
    forget()


def forget() -> None:
    """Read tables anew at the next lookup."""
    _read.cache_clear()


def drop_adopted() -> None:
    """Take rows from the tables again."""
    _adopted.clear()
    forget()


def table_path(device: torch.device) -> Path:
    """Where this user's table for a device is."""
    return _paths(device)[0]


def cache_folder() -> Path:
    """``$SHIFT_KERNELS_CACHE``, else the user's cache folder."""
    chosen = os.environ.get("SHIFT_KERNELS_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shift_kernels"


def identity(device: torch.device) -> dict[str, str]:
    """What a verdict holds for; our kernels by the hash of their sources."""
    return {
        "device": device_name(device),
        "driver": _driver() if device.type == "cuda" else torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "kernels": kernels_hash(),
    }


@functools.cache
def kernels_hash() -> str:
    """Of all that decides what a backend computes: the sources, of compiled libraries as they were built.

    The same wherever the package was built or installed from the same sources.
    """
    digest = hashlib.sha256()
    for path in sorted([*HERE.rglob("*.py"), *HERE.rglob("tuned.json")]):
        digest.update(path.relative_to(HERE).as_posix().encode() + b"\0" + path.read_bytes())
    for compiled in sorted({note.read_text() for note in HERE.glob("*.sources.txt")}):  # by build_native.py
        digest.update(compiled.encode())
    return digest.hexdigest()[:16]


def _paths(device: torch.device) -> list[Path]:
    """Where this identity's table may be: the user's own, then the shipped one."""
    facts = identity(device)
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    name = f"{_slug(facts['device'])}-{digest}.json"
    return [cache_folder() / name, SHIPPED / name]


def _rows_of(path: Path) -> dict[str, Row]:
    try:
        changed = path.stat().st_mtime_ns
    except OSError:
        return {}
    return _read(path, changed)


@functools.lru_cache(maxsize=8)
def _read(path: Path, changed: int) -> dict[str, Row]:
    """The rows of a table; none, and a warning, where it is damaged."""
    try:
        table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return {key: {b: Verdict(**v) for b, v in row.items()} for key, row in table["rows"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        warnings.warn(
            f"shift_kernels: the table {path} is damaged ({type(error).__name__}) and is not used. "
            "Delete it and run shift-calibrate again.",
            stacklevel=2,
        )
        return {}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@functools.cache
def _driver() -> str:
    """The NVIDIA driver's version, as the kernel module says it."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return f"CUDA {torch.version.cuda}"
    found = re.search(r"\b\d+\.\d+(?:\.\d+)?\b", words)
    return found[0] if found else "unknown"
