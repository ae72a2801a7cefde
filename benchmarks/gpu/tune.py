"""The fastest configurations of the Triton kernels on this device, and the table that ``auto`` chooses by.

    resident    hidden columns at a time, stages: forward and backward kernel of each shape class
    attention   tiles; what is fastest goes into ``attention.configs`` by hand
    streamed    samples in a chunk
    calibrate   every backend, verified and timed

Eight processes compile all configurations side by side, then each is timed alone. :func:`finish` writes what
was found as a ``tuned.json`` into the results. The kernels' own stays: of it is what this run has measured.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu import bench, device
from benchmarks.gpu.cases import ATTENTIONS, BLOCKS, CASES, Attention, Block
from benchmarks.gpu.results import write_atomically
from benchmarks.gpu.work import OK, REFUSED, Case, Finding, Group, a_line, rehearsing, work_folder
from shift_kernels import BlockSpec

LIMIT_S = 90.0
CALIBRATE_LIMIT_S = 400.0
SECONDS = 0.2
"""Of timed calls of a configuration."""
RESIDENT = tuple(case for case in BLOCKS if case.seq_len * case.d_model <= 64 * 256)
STREAMED = tuple(case for case in BLOCKS if case not in RESIDENT)
CANDIDATES: dict[str, tuple[int, ...]] = dict(stages=(1, 2), ff_chunk=(16, 32, 64))
"""Values of fields of ``tuned.Config``. Warps follow from the rows: more of them compute products twice."""
if rehearsing():
    CANDIDATES = dict(stages=(1,), ff_chunk=(16,))
    RESIDENT, STREAMED = (Block(1, 5, 16, 2, 1),), (Block(1, 136, 16, 2, 1),)
    CASES |= {case.name: case for case in (*RESIDENT, *STREAMED)}
DIRECTIONS = {"forward": "forward", "backward": "both"}
"""What is timed for a kernel: a backward has no call of its own."""

Config = Mapping[str, int] | Sequence[int] | int | None
"""Of a resident kernel, an attention's tile, a chunk; None: what is in use."""


# The plan.


def groups() -> list[Group]:
    """Compile all, time all, calibrate."""
    shapes = [("resident", case, _resident()) for case in RESIDENT]
    shapes += [("attention", case, _tiles(case)) for case in ATTENTIONS]
    shapes += [("streamed", case, _chunks(case)) for case in STREAMED]
    tried = [
        (kind, case.name, kernel, config)
        for kind, case, configs in shapes
        for kernel in DIRECTIONS
        for config in configs
    ]
    compiled = [[_case("compile", *one)] for one in tried if one[0] != "streamed"]
    by_kind = [list(ones) for _, ones in itertools.groupby(tried, key=lambda one: one[0])]
    timed = [[_case("time", *one) for one in ones] for ones in by_kind]
    blocks, grads = (RESIDENT, (False,)) if rehearsing() else (BLOCKS, (False, True))
    problems = [[_problem(case, grad)] for case in blocks for grad in grads]
    return [Group(_by_eights(compiled), workers=8), Group(timed), Group(problems)]


def _by_eights(batches: list[list[Case]]) -> list[list[Case]]:
    """Fewer processes: what only compiles may share one."""
    cases = [case for batch in batches for case in batch]
    return [cases[i : i + 8] for i in range(0, len(cases), 8)]


def _case(do: str, kind: str, case: str, kernel: str, config: Config) -> Case:
    words = "in use" if config is None else json.dumps(config)
    arguments = dict(do=do, kind=kind, case=case, kernel=kernel, config=config)
    return Case("tune", f"{do} / {kind} / {case} / {kernel} / {words}", LIMIT_S, arguments)


def _problem(case: Block, grad: bool) -> Case:
    direction = "both" if grad else "forward"
    name = f"calibrate / {case.name} / {direction}"
    return Case("tune", name, CALIBRATE_LIMIT_S, dict(do="calibrate", case=case.name, grad=grad))


def _resident() -> list[Config]:
    values = itertools.product(*CANDIDATES.values())
    return [None, *(dict(zip(CANDIDATES, one, strict=True)) for one in values)]


def _tiles(case: Attention) -> list[Config]:
    found = list(tiles(case.seq_len))
    return [None, *(found[:1] if rehearsing() else found)]


def tiles(seq_len: int) -> Iterator[tuple[int, int, int, int]]:
    """Rows owned, rows walked, warps, stages; no tile longer than the sequence padded."""
    longest = max(16, 1 << (seq_len - 1).bit_length())
    for own, walk, warps, stages in itertools.product(
        (16, 32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3)
    ):
        if max(own, walk) <= longest and 1024 <= own * walk <= 128 * 128 and stages * walk <= 256:
            yield own, walk, warps, stages


def _chunks(case: Block) -> list[Config]:
    return [None, *chunks(case.batch)]


def chunks(batch: int) -> list[int]:
    """The whole batch, halves of it, quarters of it, and so on."""
    return sorted({max(1, batch >> i) for i in range(6)}, reverse=True)


# What a case does.


def run(case: Case) -> Finding:
    """Compile, time or calibrate."""
    arguments = dict(case.arguments)
    do = arguments.pop("do")
    return calibrate(**arguments) if do == "calibrate" else trial(compile_only=do == "compile", **arguments)


def trial(kind: str, case: str, kernel: str, config: Config, compile_only: bool) -> Finding:
    """Run a case with a configuration in the place of that in use; refused: it does not fit on chip."""
    from triton.runtime.errors import OutOfResources

    try:
        return _trial(kind, case, kernel, config, compile_only)
    except OutOfResources as too_much:
        if config is None:  # what is in use must fit
            raise
        return Finding(REFUSED, a_line(too_much))


def _trial(kind: str, case: str, kernel: str, config: Config, compile_only: bool) -> Finding:
    here = device.here()
    asked: dict[str, Any] = {}
    patched = {"resident": _patch_resident, "attention": _patch_tiles, "streamed": _patch_chunk}[kind]
    _forget()
    with patched(config, kernel == "backward", asked):
        step = bench.steps(CASES[case], "triton", here.torch)[1][DIRECTIONS[kernel]]
        step()
        here.synchronize()
        if not asked:
            raise RuntimeError(
                f"the {kind} kernels did not ask for a configuration: is this served by others?"
            )
        if compile_only:
            return Finding()
        ms = statistics.median(device.times(here, step, SECONDS))
    facts = dict(kind=kind, case=case, kernel=kernel, in_use=config is None, ms=ms)
    return Finding(OK, "", facts | asked)


def _forget() -> None:
    """Empty the caches of plans that were made for another configuration."""
    for name, module in list(sys.modules.items()):
        if name.startswith("shift_kernels.backends.triton") or name == "shift_kernels.dispatch":
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


@contextlib.contextmanager
def _patch_resident(config: Config, backward: bool, asked: dict[str, Any]) -> Iterator[None]:
    from shift_kernels.backends.triton import tuned

    in_use = tuned.config

    def chosen(*shape: int, grad: bool, sm: int) -> tuned.Config:
        found = in_use(*shape, grad=grad, sm=sm)
        if grad != backward:
            return found
        if isinstance(config, Mapping):
            found = found._replace(**config)
        shape_class = tuned.shape_class(*shape, grad=grad)
        asked.update(config=found._asdict(), architecture=tuned.architecture(sm), shape_class=shape_class)
        return found

    with mock.patch.object(tuned, "config", chosen):
        yield


@contextlib.contextmanager
def _patch_tiles(config: Config, backward: bool, asked: dict[str, Any]) -> Iterator[None]:
    from shift_kernels.backends.triton import attention as kernels

    in_use = kernels.configs

    def chosen(*shape: int) -> tuple[Any, Any, Any]:
        forward, dq, dkv = in_use(*shape)
        if isinstance(config, Sequence):
            tile = kernels.Config(*config)
            forward, dq, dkv = (forward, tile, tile) if backward else (tile, dq, dkv)
        asked["config"] = [dataclasses.astuple(c) for c in ((dq, dkv) if backward else (forward,))]
        return forward, dq, dkv

    with mock.patch.object(kernels, "configs", chosen):
        yield


@contextlib.contextmanager
def _patch_chunk(config: Config, backward: bool, asked: dict[str, Any]) -> Iterator[None]:
    from shift_kernels.backends.triton import streamed

    in_use = streamed._chunk_size

    def chosen(*arguments: Any) -> int:
        size = config if isinstance(config, int) else in_use(*arguments)
        asked["config"] = size
        return size

    with mock.patch.object(streamed, "_chunk_size", chosen):
        yield


def calibrate(case: str, grad: bool) -> Finding:
    """What ``shift-calibrate`` does for one problem; the table goes into the results."""
    from shift_kernels.calibrate import calibrate as measure
    from shift_kernels.call import Problem

    block = CASES[case]
    assert isinstance(block, Block)
    dtype = torch.float32 if rehearsing() else torch.bfloat16
    where = torch.device(device.here().torch, *(() if rehearsing() else (0,)))
    problem = Problem(
        BlockSpec(**block.options),
        block.batch,
        block.seq_len,
        dtype,
        dtype,
        where,
        grad,
        n_loops=block.n_loops,
    )
    rows = measure([problem])
    verdicts = {name: str(verdict) for row in rows.values() for name, verdict in row.items()}
    return Finding(OK, "", dict(verdicts=verdicts))


# What comes of it.


def finish(rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the table of configurations: the fastest of each shape class, others as they were."""
    from shift_kernels.backends.triton import tuned

    table = with_fastest(
        json.loads(tuned.TABLE.read_text()), [row["data"] for row in rows], device.here().name
    )
    text = json.dumps(table, indent=1, sort_keys=True) + "\n"
    write_atomically(work_folder() / "tuned.json", text)


def with_fastest(table: dict[str, Any], found: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    """The table with the fastest of what was found.

    Args:
        table: architecture -> shape class -> entry, as ``tuned.json`` holds it.
        found: data of this stage's rows.
        name: of the device.
    """
    best: dict[tuple[str, str], Mapping[str, Any]] = {}
    for one in found:
        if one.get("kind") == "resident" and one.get("ms") is not None:
            key = one["architecture"], one["shape_class"]
            if key not in best or one["ms"] < best[key]["ms"]:
                best[key] = one
    for (architecture, shape), one in best.items():
        entry = dict(one["config"]) | {"chosen_by": name, "ms": one["ms"]}
        table.setdefault(architecture, {})[shape] = entry
    return table
