"""Every Triton kernel compiles for GPUs, without one, and stays within its limits."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)

from shift_kernels.backends.triton import tuned

ROOT = Path(__file__).parents[2]
RECORDED = json.loads((ROOT / "benchmarks/results/offline/triton.json").read_text())["rows"]


def run(code):
    """In a process of its own: kernels that another test has interpreted cannot be compiled."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    child = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-3000:]
    return json.loads(child.stdout)


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


@pytest.mark.parametrize("calls", CALLS.values(), ids=CALLS)
def test_every_kind_of_call_compiles_without_large_spills(calls):
    rows = run(
        "import json, torch; from benchmarks.offline import cases, compiling; "
        f"calls = [{', '.join(f'lambda: cases.{call}' for call in calls)}]; "
        "print(json.dumps([row for call in calls for row in compiling.figures(90, call)]))"
    )
    assert rows
    for row in rows:
        assert row["shared"] <= row["shared_limit"]
        assert row["spill_stores"] <= 64, row


def test_relu_keeps_a_nan_on_the_hardware():
    ptx = run("""
import json, torch
from benchmarks.offline.compiling import launches
from shift_kernels.backends.triton import rows

with launches(90) as found:
    x = torch.zeros(4, 8)
    rows.activation(x, None, "relu", torch.empty_like(x))
print(json.dumps(found[0].asm["ptx"]))
""")
    assert "max.NaN.f32" in ptx
    assert "max.f32" not in ptx  # which returns the operand that is a number


def test_another_number_of_loops_compiles_nothing():
    compiled = run("""
import json, torch
from benchmarks.offline.compiling import launches
from shift_kernels import BlockSpec, LoopedBlock
from shift_kernels.backends.triton.backend import TRITON as backend
from shift_kernels.call import CallOptions

spec = BlockSpec(d_model=16, n_heads=1, d_ff=16)
weights = {k: v.detach() for k, v in LoopedBlock(spec).weights().items()}
with launches(90) as found:
    for n_loops, batch, seq_len in ((1, 1, 16), (2, 3, 16), (5, 8, 9)):
        e = torch.randn(batch, seq_len, 16)
        call_options = CallOptions(n_loops, e.dtype)
        backend.forward(e, weights, spec, call_options, for_backward=True)
        saved = backend.saved_like(e, spec, n_loops)
        backend.backward(e, e, weights, spec, call_options, saved)
print(json.dumps([len(found), len(set(map(id, found)))]))
""")
    assert compiled == [15, 5]  # launches; kernels: pack, forward, backward, multiply, unpack


@pytest.mark.parametrize("sm", [80, 90, 100])
def test_recorded_kernels_fit_on_chip(sm):
    rows = [row for row in RECORDED if row["sm"] == sm]
    assert {row["case"].split()[0] for row in rows} == {"block", "attention", "layer"}
    for row in rows:
        assert row["shared"] <= row["shared_limit"], row
        assert row["tensor_memory"] <= 512, row
        if "bf16" in row["case"] and not row["case"].startswith("layer"):
            assert row["matmuls"], row  # what does not fit tensor memory becomes nothing, without a word


# Bytes of spill stores a thread, at most. Only the backward of larger tiles and fp32 need any.
SPILLS = {
    "forward": {"32x64": 0, "64x64": 0, "64x128": 0, "128x64": 0, "64x256": 512},
    "backward": {"32x64": 0, "64x64": 512},
}


@pytest.mark.parametrize(("kernel", "tile"), [(k, t) for k, tiles in SPILLS.items() for t in tiles])
def test_hopper_bf16_tiles_spill_no_more_than_stated(kernel, tile):
    (row,) = (
        r
        for r in RECORDED
        if (r["kernel"], r["sm"], r["case"]) == (f"resident_{kernel}", 90, f"block {tile} bf16")
    )
    assert row["spill_stores"] <= SPILLS[kernel][tile]


def test_every_entry_of_the_table_was_compiled_as_it_is_launched():
    recorded = {}
    for r in RECORDED:
        if r["case"].startswith("block"):
            _, tile, dtype = r["case"].split()
            name = f"{r['kernel'].removeprefix('resident_')} {tile} {32 if dtype == 'fp32' else 16}-bit"
            recorded[tuned.family(r["sm"] // 10), name] = r["warps"]
    for family, classes in tuned.table().items():
        for name, config in classes.items():
            assert recorded[family, name] == config.warps, (family, name)
