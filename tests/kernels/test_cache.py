"""A cache per loop: tokens appended one by one are what one call with all of them gives."""

import pytest
import torch
from torch import nn

from shift_kernels import BlockSpec, LoopedBlock, LoopedCache, ShiftInputError, ShiftTypeError, explain
from shift_kernels.backends.cpu import CPU

BACKENDS = ["torch", "cpu"] if CPU.why_not(None) is None else ["torch"]
OPTIONS = {
    "gpt": {"injection": "add"},
    "rope": {"position": "rope", "n_layers": 2, "norm": "rmsnorm", "activation": "swiglu"},
    "grouped": {"n_heads": 4, "n_kv_heads": 2, "head_dim": 6, "position": "rope", "injection": "add"},
}
BATCH, MAX_LEN = 3, 12


@pytest.fixture(params=OPTIONS.values(), ids=list(OPTIONS))
def block(request):
    torch.manual_seed(0)
    return LoopedBlock(BlockSpec(**{"d_model": 16, "n_heads": 2, **request.param})).requires_grad_(False)


def appended(block, e, n_loops, cuts, backend="torch", **cache_options):
    """h of e, handed over in pieces that end at ``cuts``."""
    most = n_loops if isinstance(n_loops, int) else int(n_loops.max())
    cache = LoopedCache(block.spec, e.shape[0], MAX_LEN, most, dtype=e.dtype, **cache_options)
    pieces = zip([0, *cuts], [*cuts, e.shape[1]], strict=True)
    return torch.cat([block(e[:, a:b], n_loops, cache=cache, backend=backend) for a, b in pieces], dim=1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n_loops", [1, 3, torch.tensor([2, 0, 3])], ids=["1", "3", "own"])
@pytest.mark.parametrize("cuts", [[1, 2, 3, 4, 5, 6], [4], [3, 5]], ids=["each", "two", "three"])
def test_pieces_are_what_one_call_gives(block, n_loops, cuts, backend):
    e = torch.randn(BATCH, 7, 16)
    expected = block(e, n_loops, backend="torch")
    torch.testing.assert_close(appended(block, e, n_loops, cuts, backend), expected, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_samples_go_on_from_their_own_length(block, backend):
    lens, new = torch.tensor([4, 1, 3]), 3
    e = torch.randn(BATCH, 4 + new, 16)
    cache = LoopedCache(block.spec, BATCH, MAX_LEN, 2)
    prompt = e[:, :4].clone()
    prompt[torch.arange(4) >= lens[:, None]] = torch.nan
    found = [block(prompt, 2, seq_lens=lens, cache=cache, backend=backend)]
    assert not found[0][torch.arange(4) >= lens[:, None]].any()
    for i in range(new):
        found.append(block(e[:, 4 + i : 5 + i], 2, cache=cache, backend=backend))
    assert cache.lengths.tolist() == (lens + new).tolist()
    for b, n in enumerate(lens):
        whole = torch.cat([e[b : b + 1, :n], e[b : b + 1, 4:]], dim=1)
        expected = block(whole, 2, backend="torch")[0]
        ours = torch.cat([found[0][b, :n], *(h[b] for h in found[1:])])
        torch.testing.assert_close(ours, expected, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n_loops", [1, 2, 4])
def test_256_greedy_tokens_are_those_of_full_recomputation(n_loops, backend):
    torch.manual_seed(n_loops)
    block = LoopedBlock(BlockSpec(16, 2, position="rope", injection="add")).requires_grad_(False)
    embed, lens, new = nn.Embedding(11, 16).requires_grad_(False), torch.tensor([3, 1]), 256
    tokens = torch.randint(11, (2, 3))
    cache = LoopedCache(block.spec, 2, 3 + new, n_loops)

    def logits(h):
        return h @ embed.weight.T

    h = block(embed(tokens), n_loops, seq_lens=lens, cache=cache, backend=backend)
    steps = [logits(h[torch.arange(2), lens - 1])]
    made = [steps[0].argmax(-1)]
    while len(made) < new:
        h = block(embed(made[-1])[:, None], n_loops, cache=cache, backend=backend)
        steps.append(logits(h[:, 0]))
        made.append(steps[-1].argmax(-1))
    # By induction: each greedy token of all recomputed at once follows from those before it, which are ours.
    for b, n in enumerate(lens):
        whole = torch.cat([tokens[b, :n], torch.stack(made)[:-1, b]])
        h = block(embed(whole)[None], n_loops, backend="torch")[0, n - 1 :]
        assert torch.equal(logits(h).argmax(-1), torch.stack(made)[:, b])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n_loops", [1, 2, 4])
def test_256_tokens_in_bfloat16_are_as_near_the_truth_as_recomputation(n_loops, backend):
    """A block in bfloat16 whose keys and values stay float32: what auto serves in one C++ call on a CPU."""
    torch.manual_seed(n_loops)
    spec = BlockSpec(16, 2, position="rope", injection="add")
    block = LoopedBlock(spec, dtype=torch.bfloat16).requires_grad_(False)
    embed, prompt, new = nn.Embedding(11, 16).requires_grad_(False).bfloat16(), torch.tensor([[3, 1, 4]]), 256
    cache = LoopedCache(spec, 1, 3 + new, n_loops, dtype=torch.float32)
    tokens, states = prompt, []
    h = block(embed(prompt), n_loops, cache=cache, backend=backend)
    while len(states) < new:
        states.append(h[:, -1:])
        tokens = torch.cat([tokens, (states[-1] @ embed.weight.T).argmax(-1)], dim=1)
        h = block(embed(tokens[:, -1:]), n_loops, cache=cache, backend=backend)
    e, ours = embed(tokens[:, :-1]), torch.cat(states, dim=1)
    recomputed = block(e, n_loops, backend="torch")[:, 2:]
    exact = block.double()(e.double(), n_loops, backend="torch")[:, 2:]
    logits = embed.weight.double().T
    error, allowed = (((h.double() - exact) @ logits).norm() for h in (ours, recomputed))
    assert error <= 2 * allowed


def test_shared_caches_hold_the_last_loops(block):
    """keep_loops = k: what is kept is the k-th part, and all that one token in each call needs."""
    e = torch.randn(BATCH, 5, 16)
    whole = LoopedCache(block.spec, BATCH, MAX_LEN, 4)
    shared = LoopedCache(block.spec, BATCH, MAX_LEN, 4, keep_loops=2)
    assert whole.nbytes == 2 * shared.nbytes
    block(e, 4, cache=whole)
    block(e, 4, cache=shared)
    for loop in (3, 4):  # of which a prompt in one call leaves the same
        torch.testing.assert_close(whole.slot(loop), shared.slot(loop))
    assert not torch.allclose(whole.slot(1), shared.slot(1))


def test_a_sample_that_is_done_leaves_shared_caches_alone(block):
    e = torch.randn(BATCH, 3, 16)
    cache = LoopedCache(block.spec, BATCH, MAX_LEN, 4, keep_loops=2)
    block(e, torch.tensor([1, 4, 2]), cache=cache)
    own = LoopedCache(block.spec, BATCH, MAX_LEN, 1)
    block(e, 1, cache=own)
    torch.testing.assert_close(cache.slot(1)[:, :, 0], own.slot(1)[:, :, 0])


def test_grown_reordered_and_cropped(block):
    e = torch.randn(BATCH, 6, 16)
    cache = LoopedCache(block.spec, BATCH, 5, 2)
    block(e[:, :5], 2, seq_lens=torch.tensor([5, 4, 3]), cache=cache)
    cache.grow(MAX_LEN)
    cache.reorder(torch.tensor([2, 2, 0]))
    assert cache.lengths.tolist() == [3, 3, 5]
    cache.crop(torch.tensor([9, 2, 4]))
    assert cache.lengths.tolist() == [3, 2, 4]
    h = block(e[:, 5:], 2, cache=cache)
    for b, (source, n) in enumerate([(2, 3), (2, 2), (0, 4)]):
        whole = torch.cat([e[source : source + 1, :n], e[b : b + 1, 5:]], dim=1)
        torch.testing.assert_close(h[b, 0], block(whole, 2)[0, -1], atol=2e-6, rtol=2e-5)
    cache.reset()
    torch.testing.assert_close(block(e, 2, cache=cache), block(e, 2), atol=2e-6, rtol=2e-5)


def state(cache):
    return [x.tolist() for x in (cache.lengths, cache.loops, cache.memory)]


WRONG_NUMBERS = {
    "negative": [0, -1, 2],
    "beyond all": [0, 1, 2**40],
    "too few": [0, 1],
    "too many": torch.tensor([0, 1, 2, 0]),
    "of rank 2": torch.tensor([[0, 1, 2]]),
    "floats": torch.tensor([0.0, 1.0, 2.0]),
    "bools": torch.tensor([True, False, True]),
    "a float of a list": [0, 1.5, 2],
    "a word": "012",
    "None": None,
}


@pytest.mark.parametrize("method", ["reorder", "crop"])
@pytest.mark.parametrize("numbers", WRONG_NUMBERS.values(), ids=list(WRONG_NUMBERS))
def test_numbers_that_are_refused_leave_the_cache_as_it_was(block, method, numbers):
    cache = LoopedCache(block.spec, BATCH, MAX_LEN, 2)
    block(torch.randn(BATCH, 4, 16), 2, seq_lens=torch.tensor([4, 2, 3]), cache=cache)
    before = state(cache)
    with pytest.raises(ShiftInputError, match=f"LoopedCache.{method}: argument '(index|lengths)'"):
        getattr(cache, method)(numbers)
    assert state(cache) == before


def test_an_index_beyond_the_batch_is_refused_and_a_list_is_an_index(block):
    cache = LoopedCache(block.spec, BATCH, MAX_LEN, 2)
    block(torch.randn(BATCH, 4, 16), 2, seq_lens=torch.tensor([4, 2, 3]), cache=cache)
    with pytest.raises(ShiftInputError, match="3 ints from 0 to 2"):
        cache.reorder([0, 1, 3])
    cache.reorder([2, 0, 0])
    assert cache.lengths.tolist() == [3, 4, 4]


def test_a_cache_that_finds_no_memory_to_grow_keeps_its_tokens(block, monkeypatch):
    cache = LoopedCache(block.spec, BATCH, MAX_LEN, 2)
    block(torch.randn(BATCH, 4, 16), 2, cache=cache)
    before = state(cache)

    def no_memory(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch, "zeros", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        cache.grow(2 * MAX_LEN)
    assert (cache.max_len, state(cache)) == (MAX_LEN, before)


@pytest.mark.parametrize("empty", [LoopedCache.reset, lambda cache: cache.crop(0)], ids=["reset", "crop"])
def test_an_empty_cache_takes_another_number_of_loops(block, empty):
    e, cache = torch.randn(BATCH, 4, 16), LoopedCache(block.spec, BATCH, MAX_LEN, 2)
    block(e, 2, cache=cache)
    empty(cache)
    torch.testing.assert_close(block(e, 1, cache=cache), block(e, 1), atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_was_filled_in_inference_mode_is_used_outside(block, backend):
    e, cache = torch.randn(BATCH, 6, 16), LoopedCache(block.spec, BATCH, MAX_LEN, 2)
    with torch.inference_mode():
        block(e[:, :4], 2, cache=cache, backend=backend)
    cache.reorder(torch.tensor([2, 0, 1]))
    h = block(e[[2, 0, 1], 4:], 2, cache=cache, backend=backend)
    torch.testing.assert_close(h, block(e, 2)[[2, 0, 1], 4:], atol=2e-6, rtol=2e-5)
    cache.reset()
    torch.testing.assert_close(block(e, 2, cache=cache), block(e, 2), atol=2e-6, rtol=2e-5)


def test_explain_tells_the_bytes_before_anything_is_allocated():
    spec = BlockSpec(1024, 16)
    cache = LoopedCache(spec, 1024, 2**20, 8, keep_loops=4)  # more than there is
    assert cache.nbytes == 4 * 2 * 1024 * 2**20 * 1024 * 4
    words = explain(spec, 1024, 1, n_loops=8, cache=cache)
    assert "33554432.0 MiB: 4 loops x 1 layers" in words
    assert cache._memory is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cache": LoopedCache(BlockSpec(32, 4), 3, 8, 2)}, "this block's spec"),
        ({"batch": 2}, "batch 2"),
        ({"n_loops": 3}, "n_loops="),
        ({"seq_len": 9}, "max_len 8"),
        ({"device": "cuda"}, "device cuda"),
        ({"cache": []}, "a LoopedCache"),
    ],
)
def test_explain_refuses_a_cache_that_the_call_would(changes, words):
    spec = BlockSpec(16, 2)
    right = {"batch": 3, "seq_len": 8, "n_loops": 2, "cache": LoopedCache(spec, 3, 8, 2)}
    assert "cache " in explain(spec, **right)
    with pytest.raises(ShiftInputError, match=words):
        explain(spec, **{**right, **changes})


def test_wrong_uses_are_refused():
    spec = BlockSpec(8, 2, causal=False)
    with pytest.raises(ShiftInputError, match="a causal block"):
        LoopedCache(spec, 1, 4, 2)
    with pytest.raises(ShiftInputError, match="keep_loops"):
        LoopedCache(BlockSpec(8, 2), 1, 4, 2, keep_loops=3)
    block, e = LoopedBlock(BlockSpec(8, 2)), torch.randn(1, 3, 8)
    cache = LoopedCache(block.spec, 1, 4, 2)
    with pytest.raises(ShiftInputError, match=r"torch\.no_grad"):
        block(e, 2, cache=cache)
    with torch.no_grad():
        for wrong, words in (
            ({"n_loops": 3}, "n_loops="),
            ({"halt_threshold": 0.1}, "halt_threshold"),
            ({"e": torch.randn(2, 3, 8)}, "batch 1"),
            ({"e": torch.randn(1, 5, 8)}, "max_len 4"),
            ({"backend": "triton"}, "triton"),
            ({"cache": LoopedCache(BlockSpec(8, 4), 1, 4, 2)}, "this block's spec"),
        ):
            with pytest.raises(ShiftInputError, match=words):
                block(**{"e": e, "n_loops": 2, "cache": cache, **wrong})
        with pytest.raises(ShiftTypeError, match="a LoopedCache"):
            block(e, 2, cache=[])
        assert cache.lengths.tolist() == [0]  # nothing was appended by what was refused
        block(e, 2, cache=cache)
        with pytest.raises(ShiftInputError, match="Keep n_loops"):
            block(e[:, :1], 1, cache=cache)
