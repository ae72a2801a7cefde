"""csrc/cuda/tile for sm_90a: mbarriers, bulk copies, clusters and wgmma, emulated; mistakes in their use."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from cuda_emulation import CSRC, EmulationError
from test_cuda_tile import SEEDS, normal

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

KERNELS = Path(__file__).parents[1] / "cuda_emulation" / "hopper_kernels.cu"
K = 128
NONE, NO_FENCE, NO_PROXY_FENCE, NO_WAIT, EARLY_STORE = range(5)
CHANGED_OPERAND, NO_RELEASE_WAIT, WRONG_BYTES, NO_SYNC_BEFORE, NO_SYNC_AFTER, NO_CLUSTER_FENCE = range(5, 11)


def operands(gpu, n, dtype):
    a, b = normal(64, K, dtype=dtype), normal(n, K, dtype=dtype)
    return gpu.tensor(a), gpu.tensor(b), gpu.tensor(torch.zeros(64, n)), 1 + a.float() @ b.float().T


@pytest.mark.parametrize("b_major", [0, 1], ids=["b K-major", "b N-major"])
@pytest.mark.parametrize("a_in", [0, 1, 2], ids=["a K-major", "a M-major", "a in registers"])
@pytest.mark.parametrize(("dtype", "n"), [(torch.bfloat16, 128), (torch.float16, 32)], ids=str)
def test_wgmma_reads_every_layout(gpu, dtype, n, a_in, b_major):
    a, b, c, expected = operands(gpu, n, dtype)
    for seed in range(3):
        gpu.run("run_layouts", int(dtype == torch.float16), a_in, b_major, a, b, c.zero_(), seed=seed)
        torch.testing.assert_close(c, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("n", [16, 32, 64, 96, 128, 192, 256])
def test_wgmma_has_every_number_of_columns(gpu, n):
    a, b, c, expected = operands(gpu, n, torch.bfloat16)
    gpu.run("run_columns", n, a, b, c)
    torch.testing.assert_close(c, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("grid", "cluster"), [(1, 1), (2, 1), (2, 2), (4, 2), (4, 4)])
def test_a_ring_of_copied_stages_delivers_every_tile(gpu, grid, cluster):
    x, y = normal(10, 128), gpu.tensor(torch.zeros(grid, 128))
    for seed in SEEDS:
        gpu.run("run_ring", NONE, grid, cluster, gpu.tensor(x), y.zero_(), 10, seed=seed)
        torch.testing.assert_close(y, x.sum(0).expand(grid, 128))


@pytest.mark.parametrize("kernel", ["run_neighbour", "run_neighbour_by_mbarrier"])
@pytest.mark.parametrize(("grid", "cluster"), [(2, 2), (6, 3), (8, 8)])
def test_blocks_read_each_others_shared_memory(gpu, grid, cluster, kernel):
    x, y = normal(grid // cluster, cluster, 32), gpu.tensor(torch.zeros(grid // cluster, cluster, 32))
    for seed in SEEDS:
        gpu.run(kernel, NONE, grid, cluster, gpu.tensor(x), y.zero_(), seed=seed)
        assert torch.equal(y, x.roll(-1, 1))


def test_mbarrier_phases_put_threads_in_turn(gpu):
    out = gpu.tensor(torch.zeros(5 * 32, dtype=torch.int32))
    for seed in SEEDS:
        gpu.run("run_turns", out.zero_(), 5, seed=seed)
        assert torch.equal(out, torch.arange(32, dtype=torch.int32).repeat(5))


# Mistakes


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (NO_FENCE, "without wgmma_fence"),
        (NO_PROXY_FENCE, "did not follow by fence_async_proxy"),
        (EARLY_STORE, "while wgmma reads it"),
        (CHANGED_OPERAND, "registers of a were changed"),
    ],
)
def test_wgmma_used_wrongly_is_reported(watched, mistake, message):
    a, b, c, _ = operands(watched, 32, torch.bfloat16)
    for seed in SEEDS:
        with pytest.raises(EmulationError, match=message):
            watched.run("run_bad_product", mistake, a, b, c, seed=seed)


def test_accumulators_are_nan_until_waited_for(gpu):
    a, b, c, _ = operands(gpu, 32, torch.bfloat16)
    for seed in SEEDS:
        gpu.run("run_bad_product", NO_WAIT, a, b, c.zero_(), seed=seed)
        assert c.isnan().all()


@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (NO_WAIT, "while an asynchronous copy writes it|race at|two phases passed"),
        (NO_RELEASE_WAIT, "race at|while an asynchronous copy writes it|two phases passed|more arrivals"),
        (WRONG_BYTES, "deadlock: .* threads wait at mbarrier_wait"),
    ],
)
def test_a_ring_used_wrongly_is_reported(watched, mistake, message, cluster):
    x, y = watched.tensor(normal(10, 128)), watched.tensor(torch.zeros(2, 128))
    for seed in SEEDS:
        with pytest.raises(EmulationError, match=message):
            watched.run("run_ring", mistake, 2, cluster, x, y, 10, seed=seed)


@pytest.mark.parametrize(
    ("kernel", "mistake"),
    [("run_neighbour", NO_SYNC_BEFORE), ("run_neighbour_by_mbarrier", NO_CLUSTER_FENCE)],
)
def test_unordered_accesses_between_blocks_are_reported(watched, kernel, mistake):
    x, y = watched.tensor(normal(2, 32)), watched.tensor(torch.zeros(2, 32))
    for seed in SEEDS:
        with pytest.raises(EmulationError, match="race at byte"):
            watched.run(kernel, mistake, 2, 2, x, y, seed=seed)


def test_reading_a_block_that_has_returned_is_reported(watched):
    x, y = watched.tensor(normal(2, 32)), watched.tensor(torch.zeros(2, 32))
    reported = 0
    for seed in range(20):
        try:
            watched.run("run_neighbour", NO_SYNC_AFTER, 2, 2, x, y, seed=seed)
        except EmulationError as error:
            assert "which has returned" in str(error)  # noqa: PT017
            reported += 1
    assert reported


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_nvcc_takes_every_wrapper(tmp_path):
    command = [
        "nvcc",
        "-std=c++17",
        "-gencode=arch=compute_90a,code=sm_90a",
        f"-I{CSRC / 'cuda'}",
        "-c",
        str(KERNELS),
    ]
    done = subprocess.run([*command, "-o", str(tmp_path / "kernels.o")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
