"""Every CUDA kernel compiles for sm_80 and sm_90a without a GPU, and stays within its limits."""

import json
import shutil
from pathlib import Path

import pytest

import build_native
from benchmarks.gpu.cases import BLOCKS
from benchmarks.offline import compile_cuda
from benchmarks.offline.limits import REGISTERS, SHARED_LIMIT
from shift_kernels import compiled

ROOT = Path(__file__).parents[2]
RECORDED = json.loads((ROOT / "benchmarks/results/offline/cuda.json").read_text())
RESIDENT = ("resident_forward", "resident_backward")
SM90A = tuple(f"{name}_sm90a" for name in RESIDENT)
# Bytes of spill stores a thread, at most, called functions included.
SPILLS = {"resident_forward": 212, "resident_backward": 500, "pack_layer": 0}
SPILLS |= {"resident_forward_sm90a": 72, "resident_backward_sm90a": 376}
# Of a kernel for one shape: more where x takes 128 registers of a forward.
SHAPE_SPILLS = {"forward": 4, "backward": 128, "block-b256-n64-d256-h8-T12 forward": 128}
# Warp instructions a token and loop of the forwards with x in registers.
A_TOKEN = {
    "block-b1024-n32-d64-h4-T20": 270,
    "block-b512-n64-d128-h4-T12": 530,
    "block-b256-n64-d256-h8-T12": 1200,
}
# Fences of the whole device and invalidations of L1: the two barriers of a cluster, and the meetings of a
# split sequence (three in the forward, five in the backward; a fence and up to two invalidations at each).
FENCES = {"resident_forward_sm90a": (5, 8), "resident_backward_sm90a": (7, 12)}
kernels = pytest.mark.parametrize(
    "row", RECORDED["kernels"], ids=[f"{r['object']} {r['kernel']} sm_{r['sm']}" for r in RECORDED["kernels"]]
)


@pytest.mark.skipif(build_native.nvcc() is None, reason="needs nvcc")
@pytest.mark.skipif(shutil.which("c++filt") is None, reason="needs c++filt")
def test_recorded_figures_are_those_of_the_present_sources(monkeypatch):
    monkeypatch.chdir(ROOT)
    library, status = compiled.load("_native_cuda", compile_cuda.build())
    assert RECORDED["plans"] == list(compile_cuda.plans(library)), "run benchmarks/offline/compile_cuda.py"
    # Another nvcc allocates other registers.
    if status == RECORDED["built"] and compile_cuda.cuobjdump():
        assert RECORDED["kernels"] == compile_cuda.kernels(), "run benchmarks/offline/compile_cuda.py"


@pytest.mark.skipif(build_native.nvcc() is None, reason="needs nvcc")
def test_compiler_inserts_no_waits_between_wgmmas(monkeypatch):
    monkeypatch.chdir(ROOT)
    compile_cuda.build()
    said = "".join(log.read_text() for log in compile_cuda.logs())
    assert all(name in said for name in SM90A)
    assert "serialized" not in said


def test_each_architecture_has_its_kernels():
    found = {(row["kernel"], row["sm"]) for row in RECORDED["kernels"]}
    expected = {(f"{k}<{t}>", 80) for k in RESIDENT for t in ("bf16", "fp16")}
    expected |= {(f"{k}<bf16>", 90) for k in SM90A}
    packs = [f"pack_layer<{kind}>" for kind in ("Sm80, bf16", "Sm80, fp16", "Sm90a, bf16")]
    assert found == expected | {(name, sm) for name in packs for sm in (80, 90)}


@kernels
def test_kernels_fit_the_registers_of_a_multiprocessor_and_spill_no_more_than_stated(row):
    name = row["kernel"].split("<")[0]
    assert row["registers"] > 16, "a kernel that does nothing"
    planned = [
        p["threads"] for p in RECORDED["plans"] if "threads" in p and (p["tiles"] > 0) == (name in SM90A)
    ]
    threads = 256 if name == "pack_layer" else max(planned)
    assert row["registers"] * threads <= REGISTERS
    assert row["spill_stores"] <= SPILLS[name]


@kernels
def test_only_blocks_that_share_a_sequence_pay_for_the_scope_of_a_cluster(row):
    fences, invalidations = FENCES.get(row["kernel"].split("<")[0], (0, 0))
    assert row["device_fences"] <= fences
    assert row["l1_invalidations"] <= invalidations


@pytest.mark.skipif(build_native.nvcc() is None, reason="needs nvcc")
@pytest.mark.skipif(compile_cuda.cuobjdump() is None, reason="needs cuobjdump")
def test_recorded_figures_of_a_kernel_for_one_shape_are_those_of_the_present_sources(monkeypatch):
    monkeypatch.chdir(ROOT)
    library, status = compiled.load("_native_cuda", compile_cuda.build())
    if status == RECORDED["built"]:
        found = next(compile_cuda.shape_kernels(library))  # one: each takes seconds to a minute
        recorded = RECORDED["shapes"][0]
        time = {"compile_cpu_s": recorded["compile_cpu_s"]}
        assert recorded == found | time, "run benchmarks/offline/compile_cuda.py --shapes"


def test_every_timed_shape_has_its_kernels():
    names = [(row["case"], row["kernel"]) for row in RECORDED["shapes"]]
    assert names == [(case.name, f"{kernel}<bf16>") for case in compile_cuda.SHAPES for kernel in SM90A]


@pytest.mark.parametrize(
    "row", RECORDED["shapes"], ids=[f"{r['case']} {r['kernel']}" for r in RECORDED["shapes"]]
)
def test_kernels_for_one_shape_are_small_and_hardly_spill(row):
    backward, split = "backward" in row["kernel"], row["case"].startswith("trm")
    assert not row["waits_for_wgmma"]
    assert row["calls"] == 0
    assert row["instructions"] <= (16_000 if backward else 7_000)
    direction = "backward" if backward else "forward"
    assert row["spill_stores"] <= SHAPE_SPILLS.get(f"{row['case']} {direction}", SHAPE_SPILLS[direction])
    assert row["device_fences"] <= (2 if not split else 7 if backward else 4)


def test_kernels_with_x_in_registers_take_no_more_instructions_than_stated():
    rows = RECORDED["shapes"]
    counted = {r["case"]: r["instructions_a_token"] for r in rows if "instructions_a_token" in r}
    assert counted.keys() == A_TOKEN.keys()
    assert all(counted[case] is not None and counted[case] <= A_TOKEN[case] for case in A_TOKEN), counted


@kernels
def test_a_program_is_not_in_local_memory(row):
    # Spills are, and addresses that may be of either memory. A Program there was a tenth of all instructions.
    assert row["local_or_generic_loads"] <= 0.05 * row["instructions"]


def test_planned_shared_memory_is_there():
    planned = [row for row in RECORDED["plans"] if "refused" not in row]
    static = max(row["static_shared"] for row in RECORDED["kernels"])
    for row in planned:
        assert row["shared_bytes"] + static <= SHARED_LIMIT[row["sm"]], row


def test_blocks_up_to_128_tokens_are_served_on_hopper():
    served = {row["case"] for row in RECORDED["plans"] if row["sm"] == 90 and "refused" not in row}
    assert served == {case.name for case in BLOCKS if case.seq_len <= 128}
