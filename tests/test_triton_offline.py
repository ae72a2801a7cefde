"""The resident kernels compile for GPUs, without one, and stay within their limits."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)

ROOT = Path(__file__).parents[1]


def run(code):
    """In a process of its own: kernels that another test has interpreted cannot be compiled."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    child = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-3000:]
    return json.loads(child.stdout)


@pytest.mark.parametrize(
    "options",
    [
        dict(activation="swiglu", position="rope", n_layers=2, injection="add"),
        dict(norm="rmsnorm", norm_placement="post", loop_norm=True, activation="relu"),
        dict(norm_placement="sandwich", residual_scale=0.5, activation="gelu_tanh", causal=False),
    ],
    ids=["swiglu rope", "post loop_norm", "sandwich scaled"],
)
def test_every_kind_of_block_compiles_without_large_spills(options):
    rows = run(
        "import json, torch; from benchmarks.offline import compile_triton as c; print(json.dumps("
        f"[f(16, 32, torch.bfloat16, 90, d_ff=32, **{options!r}) for f in (c.forward, c.backward)]))"
    )
    for row in rows:
        assert row["shared"] <= row["shared_limit"]
        assert row["spill_stores"] <= 64, row


def test_another_number_of_loops_compiles_nothing():
    compiled = run("""
import json, torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

class NoGpu:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device=None: 0)

triton.runtime.driver.set_active(NoGpu())
compiled, run = [], JITFunction.run

def only_compile(self, *args, grid, warmup, **options):
    compiled.append(id(run(self, *args, grid=grid, warmup=True, **options)))

JITFunction.run = only_compile
from shift_kernels import BlockSpec, LoopedBlock, triton_backend as backend
spec = BlockSpec(d_model=16, n_heads=1, d_ff=16)
weights = {k: v.detach() for k, v in LoopedBlock(spec).weights().items()}
call = dict(seq_lens=None, return_all_loops=False, n_grad_loops=None, compute_dtype=None)
for n_loops, batch, seq_len in ((1, 1, 16), (2, 3, 16), (5, 8, 9)):
    e = torch.randn(batch, seq_len, 16)
    h, _, saved = backend.forward(e, weights, spec, n_loops, halt_threshold=None, for_backward=True, **call)
    backend.backward(h, e, weights, spec, n_loops, saved=saved, **call)
print(json.dumps([len(compiled), len(set(compiled))]))
""")
    assert compiled == [6, 2]  # launches; kernels: one forward, one backward


def test_recorded_tiles_fit_on_chip():
    rows = json.loads((ROOT / "benchmarks/results/offline/triton_resident.json").read_text())["rows"]
    assert {(row["kernel"], row["sm"]) for row in rows} == {
        (kernel, sm) for kernel in ("forward", "backward") for sm in (80, 90, 100)
    }
    for row in rows:
        assert row["shared"] <= row["shared_limit"], row
        assert row["tensor_memory"] <= 512, row
