"""Every Triton kernel compiles for GPUs, without one, and stays within its limits."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)

from benchmarks.offline import cases, instructions
from shift_kernels.backends.triton import resident_plan, tuned

ROOT = Path(__file__).parents[2]
RECORDED = json.loads((ROOT / "benchmarks/results/offline/triton.json").read_text())["rows"]
RESIDENT = [row for row in RECORDED if row["kernel"].startswith("resident")]


SMALL = "16, 32, torch.bfloat16, d_ff=32"
CALLS = {
    "swiglu rope": [
        f"block({SMALL}, grad={grad}, activation='swiglu', position='rope', n_layers=2, ragged=True)"
        for grad in (False, True)
    ],
    "post loop_norm": [
        f"block({SMALL}, grad={grad}, norm='rmsnorm', norm_placement='post', loop_norm=True, "
        "injection='add', activation='relu', own_loops=True, keep_all=True)"
        for grad in (False, True)
    ],
    "sandwich scaled": [
        f"block({SMALL}, norm_placement='sandwich', residual_scale=0.5, activation='gelu_tanh', "
        f"causal=False, {rest})"
        for rest in ("grad=False, halt=True", "grad=True")
    ],
    "ragged attention": ["attention(16, torch.bfloat16, ragged=True)"],
    "streamed": ["layer(64, torch.bfloat16)"],
}


COMPILE = """
import json, torch
from benchmarks.offline import cases
from benchmarks.offline.compiling import figures, launches
from shift_kernels import BlockSpec, LoopedBlock
from shift_kernels.backends.triton import rows
from shift_kernels.backends.triton.backend import TRITON
from shift_kernels.call import CallOptions

found = {name: [row for call in calls for row in figures(90, call)] for name, calls in CALLS.items()}
with launches(90) as relu:
    x = torch.zeros(4, 8)
    rows.activation(x, None, "relu", torch.empty_like(x))
spec = BlockSpec(d_model=16, n_heads=1, d_ff=16)
weights = {k: v.detach() for k, v in LoopedBlock(spec).weights().items()}
with launches(90) as launched:
    for n_loops, batch, seq_len in ((1, 1, 16), (2, 3, 16), (5, 8, 9)):
        e = torch.randn(batch, seq_len, 16)
        call_options = CallOptions(n_loops, e.dtype)
        TRITON.forward(e, weights, spec, call_options, for_backward=True)
        TRITON.backward(e, e, weights, spec, call_options, TRITON.saved_like(e, spec, n_loops))
numbers = [len(launched), len(set(map(id, launched)))]
print(json.dumps({"figures": found, "relu": relu[0].asm["ptx"], "launches": numbers}))
"""


@pytest.fixture(scope="module")
def compiled():
    """What a process of its own compiles: kernels that another test has interpreted cannot be compiled."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    calls = ", ".join(
        f"{name!r}: [{', '.join(f'lambda: cases.{call}' for call in calls)}]" for name, calls in CALLS.items()
    )
    code = COMPILE.replace("CALLS", f"{{{calls}}}")
    child = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-3000:]
    return json.loads(child.stdout)


@pytest.mark.parametrize("kind", CALLS)
def test_every_kind_of_call_compiles_without_large_spills(compiled, kind):
    rows = compiled["figures"][kind]
    assert rows
    for row in rows:
        assert row["shared"] <= row["shared_limit"]
        assert row["spill_stores"] <= 64, row


def test_relu_keeps_a_nan_on_the_hardware(compiled):
    assert "max.NaN.f32" in compiled["relu"]
    assert "max.f32" not in compiled["relu"]  # which returns the operand that is a number


def test_another_number_of_loops_compiles_nothing(compiled):
    assert compiled["launches"] == [15, 5]  # launches; kernels: pack, forward, backward, multiply, unpack


@pytest.mark.parametrize("sm", sorted({row["sm"] for row in RECORDED}))
def test_recorded_kernels_fit_on_chip(sm):
    rows = [row for row in RECORDED if row["sm"] == sm]
    for row in rows:
        assert row["shared"] <= row["shared_limit"], row
        assert row["tensor_memory"] <= 512, row
        if "bf16" in row["case"] and not row["case"].startswith("layer"):
            assert row["matmuls"], row  # what does not fit tensor memory becomes nothing, without a word


@pytest.mark.parametrize("row", RESIDENT, ids=lambda r: f"{r['kernel']} {r['case']} sm_{r['sm']}")
def test_the_planner_knows_how_much_shared_memory_a_kernel_takes_at_most(row):
    kind, tile, dtype = row["case"].split()
    most = resident_plan.shared_bytes(
        cases.spec_of(int(tile.split("x")[1]), **cases.WIDE.get(kind, {})),
        row["rows"],
        4 if dtype == "fp32" else 2,
        grad=row["kernel"] == "resident_backward",
        chip=cases.chip(row["sm"]),
    )
    assert row["shared"] <= most


@pytest.mark.parametrize("kind", ["block", *cases.WIDE])
def test_no_kernel_that_is_launched_spills_more_than_stated(kind):
    """The planner streams what would spill more: it counts the numbers that a thread holds."""
    rows = [r for r in RESIDENT if r["case"].split()[0] == kind]
    assert rows
    for row in rows:
        assert row["spill_stores"] <= (4096 if row["kernel"] == "resident_forward" else 3072), row


@pytest.mark.parametrize("architecture", tuned.table())
def test_every_tile_that_the_planner_keeps_on_chip_was_compiled(architecture):
    sm = int(architecture.removeprefix("sm_"))
    wide = [(tile, kind) for tile in ((64, 128), (64, 256)) for kind in cases.WIDE]
    expected = {
        (f"{kind} {tile[0]}x{tile[1]} bf16", "resident_backward" if grad else "resident_forward")
        for tile, kind in [*((tile, "block") for tile in cases.TILES), *wide]
        for grad in (False, True)
        if cases.fits(*tile, torch.bfloat16, sm, grad=grad, **cases.WIDE.get(kind, {}))
    }
    assert expected <= {(r["case"], r["kernel"]) for r in RESIDENT if r["sm"] == sm}


# Of a bf16 tile compiled for sm_90, forward and backward: warp instructions a token and loop, bytes of spill
# stores a thread.
MOST = {
    "32x64": ((300, 0), (650, 16)),
    "64x64": ((260, 0), (620, 0)),
    "64x128": ((450, 0), (1200, 128)),
    "64x256": ((1200, 512), (2950, 1024)),
}


@pytest.mark.parametrize("tile", MOST)
def test_hopper_kernels_take_no_more_instructions_and_spills_than_stated(tile):
    for direction, (most, spills) in zip(("forward", "backward"), MOST[tile], strict=True):
        case = (f"resident_{direction}", 90, f"block {tile} bf16")
        row = next(r for r in RESIDENT if (r["kernel"], r["sm"], r["case"]) == case)
        assert row["instructions"] <= most
        assert row["spill_stores"] <= spills


def test_no_narrow_kernel_computes_a_product_twice():
    """All warps lie along the rows of a chained product, 16 rows an instruction."""
    launched = [(r["warps"], r["rows"]) for r in RESIDENT if "bf16" in r["case"]]
    listed = [
        (config.warps, int(name.split()[1].split("x")[0]))
        for classes in tuned.table().values()
        for name, config in classes.items()
        if name.endswith("16-bit")
    ]
    for warps, rows in launched + listed:
        assert 16 * warps <= rows


def test_every_entry_of_the_table_was_compiled_as_it_is_launched():
    recorded = {}
    for r in RESIDENT:
        if r["case"].startswith("block"):
            _, tile, dtype = r["case"].split()
            name = f"{r['kernel'].removeprefix('resident_')} {tile} {32 if dtype == 'fp32' else 16}-bit"
            recorded[tuned.architecture(r["sm"]), name] = r["warps"]
    for architecture, classes in tuned.table().items():
        for name, config in classes.items():
            assert recorded[architecture, name] == config.warps, (architecture, name)


def test_instructions_are_weighted_by_the_trips_of_their_loop():
    code = [(address, "FADD R0, R0, R1") for address in range(0, 0xA0, 0x10)]
    for last, first in ((0x40, 0x20), (0x70, 0x50), (0x90, 0x10)):  # two loops in a third, from 0x10 on
        code[last // 0x10] = (last, f"@P0 BRA {first:#x}")
    assert instructions.weighted(code, [4, 5]) == 3 * 4 + 3 * 5 + 3
    assert instructions.weighted(code, [4]) is None
