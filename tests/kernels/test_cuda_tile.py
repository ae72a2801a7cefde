"""csrc/cuda/tile, instruction by instruction, on the emulated GPU; and that mistakes do not pass there.

Each kernel runs in several schedules (seeds), both plain and with every access watched. The layouts are those
of the PTX ISA; that a GPU agrees is not tested here.
"""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from cuda_emulation import CSRC, EmulationError, emulated

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

KERNELS = Path(__file__).parents[1] / "cuda_emulation" / "tile_kernels.cu"
SEEDS = range(6)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def as_tf32(x):
    """Rounded to 10 bits of mantissa, ties away from zero."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize(
    ("dtype", "transposed"),  # ldmatrix transposes numbers of 16 bits
    [
        (torch.bfloat16, False),
        (torch.bfloat16, True),
        (torch.float16, False),
        (torch.float16, True),
        (torch.float32, False),
    ],
)
def test_ldmatrix_and_mma_multiply(gpu, dtype, transposed):
    a, b = normal(16, 16, dtype=dtype), normal(8, 16, dtype=dtype)
    if dtype == torch.float32:
        a, b = as_tf32(a), as_tf32(b)  # else mma cuts the last bits off
    c = gpu.tensor(torch.zeros(16, 8))
    stored = gpu.tensor(b.T if transposed else b)
    for seed in SEEDS:
        gpu.run("run_product", DTYPES.index(dtype), int(transposed), gpu.tensor(a), stored, c, seed=seed)
        torch.testing.assert_close(c, a.float() @ b.float().T, rtol=1e-5, atol=1e-5)


def test_gelu_is_as_near_as_stated(gpu):
    x = torch.cat([torch.linspace(-12, 12, 24_001), torch.tensor([torch.nan, torch.inf, -torch.inf])])
    y, dx = gpu.tensor(torch.empty_like(x)), gpu.tensor(torch.empty_like(x))
    gpu.run("run_gelu", gpu.tensor(x), y, dx, len(x))
    exact = x.double().requires_grad_()
    gelu = torch.nn.functional.gelu(exact)
    (slope,) = torch.autograd.grad(gelu.sum(), exact)
    assert (y - gelu)[:-3].abs().max() <= 1e-6
    assert (dx - slope)[:-3].abs().max() <= 2e-6
    assert torch.equal(y.isfinite(), gelu.isfinite())


def test_mma_ignores_what_tf32_does_not_hold(gpu):
    a, b = normal(16, 16), normal(8, 16)
    c = gpu.tensor(torch.zeros(16, 8))
    gpu.run("run_product", 2, 0, gpu.tensor(a), gpu.tensor(b), c)
    cut_a, cut_b = ((x.view(torch.int32) & ~0x1FFF).view(torch.float32) for x in (a, b))
    torch.testing.assert_close(c, cut_a @ cut_b.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_conversions_round_to_even(gpu, dtype):
    n = 256
    x = torch.cat(
        [normal(n - 8) * 100, torch.tensor([0.0, -0.0, 1e-7, 3.0e38, -1.0, 1 + 2**-8, 1 + 2**-11, torch.inf])]
    )
    rounded, back = gpu.tensor(torch.zeros(n, dtype=dtype)), gpu.tensor(torch.zeros(n))
    gpu.run("run_convert", DTYPES.index(dtype), gpu.tensor(x), rounded, back, n)
    assert torch.equal(rounded, x.to(dtype))
    assert torch.equal(back, x.to(dtype).float())


def test_tf32_rounds_ties_away(gpu):
    x = torch.cat([normal(60), torch.tensor([1 + 2**-11, -1 - 2**-11, 1 + 2**-12, 0.0])])
    y = gpu.tensor(torch.zeros(64))
    gpu.run("run_tf32", gpu.tensor(x), y, 64)
    assert torch.equal(y, as_tf32(x))


def test_lanes_exchange(gpu):
    x = normal(2, 32)
    y = gpu.tensor(torch.zeros(4, 2, 32))
    for seed in SEEDS:
        gpu.run("run_lanes", gpu.tensor(x), y, seed=seed)
        torch.testing.assert_close(y[0], x.sum(1, keepdim=True).expand(2, 32))
        assert torch.equal(y[1], x.view(2, 8, 4).amax(-1).repeat_interleave(4, 1))
        assert torch.equal(y[2], x.roll(-5, 1))
        upper_half = (x[:, 16:] > 0).long() @ 2 ** torch.arange(16)
        assert torch.equal(y[3], upper_half.float()[:, None].expand(2, 32))


def test_fast_functions(gpu):
    x = normal(100).abs() + 0.1
    y = gpu.tensor(torch.zeros(3, 100))
    gpu.run("run_maths", gpu.tensor(x), y, 100)
    torch.testing.assert_close(y, torch.stack([x.exp2(), x.rsqrt(), x.reciprocal()]))


@pytest.mark.parametrize("n", [64, 1001])
def test_asynchronous_copies_arrive(gpu, n):
    x, y = gpu.tensor(normal(n)), gpu.tensor(torch.zeros(n))
    for seed in SEEDS:
        gpu.run("run_reversed", 0, x, y.zero_(), n, seed=seed)
        assert torch.equal(y, x.flip(0))


@pytest.mark.parametrize("warps", [1, 2, 8])
def test_named_barriers_order_warps(gpu, warps):
    out = gpu.tensor(torch.zeros(1, dtype=torch.int32))
    for seed in SEEDS:
        gpu.run("run_relay", out, warps, seed=seed)
        assert out.item() == warps * (warps + 1) // 2


# Mistakes: those that only change results by some schedules are found without running into one.


@pytest.mark.parametrize("missing", [1, 2, 3], ids=["wait", "barrier", "commit"])
def test_a_copy_that_is_not_waited_for_is_found_in_every_schedule(watched, missing):
    x, y = watched.tensor(normal(1001)), watched.tensor(torch.zeros(1001))
    for seed in SEEDS:
        with pytest.raises(EmulationError, match=r"asynchronous copy|race at"):
            watched.run("run_reversed", missing, x, y, 1001, seed=seed)


@pytest.mark.parametrize("missing", [1, 2, 3], ids=["wait", "barrier", "commit"])
def test_a_copy_that_is_not_waited_for_shows_in_some_schedule_unwatched(missing):
    gpu = emulated(KERNELS)
    x, y = gpu.tensor(normal(1001)), gpu.tensor(torch.zeros(1001))
    wrong = 0
    for seed in SEEDS:
        gpu.run("run_reversed", missing, x, y.zero_(), 1001, seed=seed)
        wrong += not torch.equal(y, x.flip(0))
    gpu.free()
    assert wrong


@pytest.mark.parametrize("kernel", ["racy_sum", "racy_lanes", "late_reader"])
def test_a_race_is_found_in_every_schedule(watched, kernel):
    x, y = watched.tensor(normal(128)), watched.tensor(torch.zeros(128))
    for seed in SEEDS:
        with pytest.raises(EmulationError, match=r"race at byte .* no barrier orders"):
            watched.run(f"run_{kernel}", x, y, seed=seed)


def test_blocks_that_write_the_same_place_are_found(watched):
    with pytest.raises(EmulationError, match="a write by another cluster"):
        watched.run("run_same_output", watched.tensor(torch.zeros(32)))


def test_reading_a_buffer_too_late_shows_in_some_schedule_unwatched():
    gpu = emulated(KERNELS)
    x, y = gpu.tensor(normal(128)), gpu.tensor(torch.zeros(128))
    wrong = 0
    for seed in range(20):
        gpu.run("run_late_reader", x, y.zero_(), seed=seed)
        wrong += not torch.allclose(y, 2 * x.roll(-32) + 1)
    gpu.free()
    assert wrong


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("half_a_barrier", "deadlock: 32 threads have returned, 32 threads wait at sync_block"),
        ("parted_lanes", "lanes of one warp part ways"),
        ("miscounted", "this barrier is awaited by"),
    ],
)
def test_divergent_barriers_are_reported(gpu, kernel, message):
    for seed in SEEDS:
        with pytest.raises(EmulationError, match=message):
            gpu.run(f"run_{kernel}", gpu.tensor(torch.zeros(96)), seed=seed)


@pytest.mark.parametrize("kernel", ["touch", "peek"])
@pytest.mark.parametrize(
    ("shared_floats", "at"),
    [(256, 256), (256, -10), (0, 32), (0, 10**6)],
    ids=["shared", "shared, before", "device", "far"],
)
def test_accesses_out_of_bounds_are_reported(watched, kernel, shared_floats, at):
    y = watched.tensor(torch.zeros(32))
    with pytest.raises(EmulationError, match="out of bounds"):
        watched.run(f"run_{kernel}", y, shared_floats, at)
    watched.run(f"run_{kernel}", y, shared_floats, 0)  # the machine goes on


def test_writes_out_of_bounds_are_reported_unwatched():
    gpu = emulated(KERNELS)
    y = gpu.tensor(torch.zeros(3))
    for shared_floats, at in [(256, 256), (250, 250), (250, -1), (0, 3), (0, 4), (0, -1), (0, 10**6)]:
        with pytest.raises(EmulationError, match="out of bounds"):
            gpu.run("run_touch", y, shared_floats, at)
        gpu.free()
        y = gpu.tensor(torch.zeros(3))
    gpu.run("run_touch", y, 250, 249)


@pytest.mark.parametrize(
    ("instruction", "message"),
    [
        (0, "misaligned load"),
        (1, "misaligned ldmatrix"),
        (2, "misaligned cp.async"),
        (3, "outside shared memory"),
    ],
)
def test_bad_addresses_are_reported(gpu, instruction, message):
    with pytest.raises(EmulationError, match=message):
        gpu.run("run_misaligned", gpu.tensor(torch.zeros(32)), instruction)


def test_shared_memory_starts_as_nan(gpu):
    y = gpu.tensor(torch.zeros(32))
    gpu.run("run_uninitialised", y)
    assert y.isnan().all()


def test_endless_recursion_and_too_much_shared_memory_are_reported(gpu):
    with pytest.raises(EmulationError, match="stack is full"):
        gpu.run("run_bottomless", gpu.tensor(torch.zeros(1, dtype=torch.int32)), 10**5)
    with pytest.raises(EmulationError, match="227 KB"):
        gpu.run("run_too_large")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_nvcc_takes_every_wrapper(tmp_path):
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ("80", "90a")]
    command = ["nvcc", "-std=c++17", *targets, f"-I{CSRC / 'cuda'}", "-c", str(KERNELS)]
    done = subprocess.run([*command, "-o", str(tmp_path / "kernels.o")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
