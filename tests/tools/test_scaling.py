"""The arithmetic of docs/scaling.md, against counts by hand."""

import pytest

from benchmarks import scaling
from benchmarks.scaling import MODEL, VOCAB, Assumed, demands, main

D, HIDDEN, LAYERS = 2048, 5632, 18


def test_parameters_and_flops_are_those_of_the_model():
    layer = 4 * D * D + 3 * D * HIDDEN
    demand = demands()[0]
    assert demand.in_blocks == pytest.approx(LAYERS * layer, rel=1e-3)  # but for norms
    assert demand.parameters - demand.in_blocks == pytest.approx(VOCAB * D, rel=1e-3)
    maps = 6 * layer * (4 + 14 * 4)  # prelude and coda once, the core four times
    attention = 12 * scaling.SEQ_LEN * D * (4 + 14 * 4)
    tokens = scaling.SEQ_LEN * scaling.SEQUENCES
    assert demand.flops[4] == pytest.approx(tokens * (maps + attention + 6 * VOCAB * D), rel=1e-6)


def test_shards_hold_less_and_send_less_and_loops_send_nothing():
    device = Assumed()
    for demand in demands():
        assert demand.memory("fsdp") < demand.memory("ddp") == 16 * demand.parameters
        assert demand.traffic("fsdp") < demand.traffic("ddp") < 8 * demand.parameters
        core = (demand.flops[4] - demand.flops[2]) / 2
        assert core * MODEL.n_loops < demand.flops[4] < core * 5
        assert demand.compute_s(4, device) == demand.flops[4] / (demand.n * 4e14)


def test_other_assumptions_give_another_table(capsys):
    assert main([]) == main(["--gbytes-per-s", "400"]) == 0
    slow, fast = capsys.readouterr().out.strip().split("| GPUs")[1:]
    assert slow != fast
