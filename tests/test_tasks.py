"""Every task: its format by hand-written examples, its answers by a slow second solution, its order."""

import itertools

import numpy as np
import pytest
import torch

from shift.tasks import IGNORE, TASKS, make_task
from shift.tasks.full_output import FullOutputTask
from shift.tasks.p_hop import PHop
from shift_kernels import ShiftInputError

X = IGNORE
every_task = pytest.mark.parametrize("name", TASKS)


def same(a, b):
    pairs = zip(vars(a).values(), vars(b).values(), strict=True)
    return all((x is None and y is None) or torch.equal(x, y) for x, y in pairs)


@every_task
def test_a_batch_depends_on_seed_split_step_and_rank_alone(name):
    first, second = make_task(name, seed=3), make_task(name, seed=3)
    keys = [(step, split, rank) for step in (0, 7) for split in ("train", "eval") for rank in (0, 1)]
    batches = {key: first.batch(8, key[0], split=key[1], rank=key[2]) for key in keys}
    for key in reversed(keys):
        assert same(second.batch(8, key[0], split=key[1], rank=key[2]), batches[key]), key
    for a, b in itertools.combinations(keys, 2):
        assert not torch.equal(batches[a].tokens, batches[b].tokens), (a, b)
    assert not torch.equal(make_task(name, seed=4).batch(8, 0).tokens, batches[0, "train", 0].tokens)


@every_task
def test_sizes_are_kept(name):
    task = make_task(name)
    for step in range(5):
        batch = task.batch(32, step)
        read = batch.targets != IGNORE
        assert batch.tokens.shape == batch.targets.shape == batch.group.shape
        assert batch.tokens.shape[1] <= task.max_seq_len
        assert set(batch.tokens.flatten().tolist()) <= set(range(task.vocab_size))
        assert set(batch.targets[read].tolist()) <= set(range(task.n_classes))
        assert torch.equal(batch.group >= 0, read)
        assert batch.group.max() < len(task.group_names)
        assert (batch.context is None) == (task.n_contexts == 0)
        if batch.context is not None:
            assert set(batch.context.tolist()) <= set(range(task.n_contexts))
        assert all(x is None or x.dtype == torch.int64 for x in vars(batch).values())


def test_hop_by_hand():
    task = make_task("hop", n_nodes=5, max_hops=3)
    batch = task.batch(200, 0)
    for f, answer, context in zip(batch.tokens.tolist(), batch.targets.tolist(), batch.context, strict=True):
        expected = list(range(5))
        for _ in range(int(context) + 1):
            expected = [f[node] for node in expected]
        assert answer == expected
    assert torch.equal(batch.group, batch.context[:, None].expand(200, 5))
    assert set(batch.context.tolist()) == {0, 1, 2}
    assert task.group_names == ("1 hop", "2 hops", "3 hops")


def test_p_hop_jumps_to_what_followed_the_last_occurrence():
    tokens = np.array([[0, 1, 0, 2, 1, 0]])
    assert PHop.find(tokens).tolist() == [[-1, -1, 1, -1, 2, 3]]


def test_p_hop_answers_by_a_slow_search():
    batch = make_task("p_hop", vocab=3, length=12, max_hops=3).batch(50, 0)
    for tokens, targets, context in zip(
        batch.tokens.tolist(), batch.targets.tolist(), batch.context, strict=True
    ):
        for i, target in enumerate(targets):
            at = i
            for _ in range(int(context) + 1):
                earlier = [j for j in range(at) if tokens[j] == tokens[at]] if at is not None else []
                at = earlier[-1] + 1 if earlier else None
            assert target == (IGNORE if at is None else tokens[at])


# Hand-written: tokens and targets of a sample in the format, from its question and answer.
FAN = {
    "parity": ([1, 0, 1, 1, 2, 3], [X, X, X, X, 1, 3]),
    "copy": ([1, 0, 1, 1, 2, 3, 3, 3, 3, 3, 3, 3], [X, X, X, X, 1, 0, 1, 1, 3, 3, 3, 3]),
    "addition": (
        [1, 0, 1, 1, 2, 0, 1, 1, 1, 5, 3, 3, 3, 3, 3, 3, 3, 3],
        [X, X, X, X, X, X, X, X, X, 1, 0, 0, 1, 0, 3, 3, 3, 3],  # 1011 + 0111 = 10010
    ),
    "binary_sum": (
        [1, 1, 1, 1, 5, 3, 3, 3, 3, 3, 3, 3, 3],
        [X, X, X, X, 0, 0, 1, 3, 3, 3, 3, 3, 3],  # four ones: 100, lowest bit first
    ),
    "multiplication": (
        [1, 1, 2, 1, 0, 1, 1, 5] + 16 * [3],
        [X, X, X, X, X, X, X, 1, 0, 0, 0, 0, 1] + 11 * [3],  # 3 * 11 = 33 = 100001
    ),
    "unique_set": (
        [7, 9, 7, 0, 51, 53, 53, 53, 53, 53, 53, 53],
        [X, X, X, X, 7, 9, 0, 53, 53, 53, 53, 53],
    ),
}


def answer_of(name, tokens):
    """The answer to a question, read from its tokens: a second, independent solution."""
    equals = {"parity": 2, "copy": 2, "unique_set": 51}.get(name, 5)
    question = tokens[: tokens.index(equals)]
    binary = lambda bits: int("".join(map(str, bits)), 2)  # noqa: E731
    if name == "parity":
        return len(question), [question.count(1) % 2]
    if name == "copy":
        return len(question), question
    if name == "binary_sum":
        return len(question), [int(c) for c in reversed(f"{question.count(1):b}") if question.count(1)]
    if name == "unique_set":
        return len(question), [v for i, v in enumerate(question) if v not in question[:i]]
    split = question.index(2)
    a, b = question[:split], question[split + 1 :]
    if name == "addition":
        return len(a), [int(c) for c in f"{binary(a) + binary(b):0{len(a) + 1}b}"]
    return len(a) * len(b), [int(c) for c in reversed(f"{binary(a) * binary(b):0{len(a) + len(b)}b}")]


DRAWS = {  # what the random generator is made to say after the length, 4
    "addition": [[1, 0, 1, 1], [0, 1, 1, 1]],
    "binary_sum": [[1, 1, 1, 1]],
    "multiplication": [2, [1, 1], [1, 0, 1, 1]],
    "unique_set": [[7, 9, 7, 0]],
}


class Scripted:
    def __init__(self, draws):
        self.draws = iter(draws)

    def integers(self, *args, **kwargs):
        return np.array(next(self.draws))


@pytest.mark.parametrize("name", FAN)
def test_fans_formats_to_the_bit(name):
    tokens, targets = FAN[name]
    task = make_task(name, max_length=4)
    batch = task.sample(Scripted([[4], *DRAWS.get(name, [[1, 0, 1, 1]])]), 1, 0, "train")
    assert batch.tokens.tolist() == [tokens]
    assert batch.targets.tolist() == [targets]
    assert task.max_seq_len == len(tokens)


@pytest.mark.parametrize("name", FAN)
def test_fans_answers_by_a_second_solution(name):
    task = make_task(name, max_length=6)
    eos = task.eos
    batch = task.batch(200, 0)
    lengths = set()
    for tokens, targets, n_loops in zip(
        batch.tokens.tolist(), batch.targets.tolist(), batch.n_loops, strict=True
    ):
        needed, answer = answer_of(name, tokens)
        equals = targets.index(next(t for t in targets if t != IGNORE))
        rest = len(targets) - equals - len(answer)
        assert targets == [IGNORE] * equals + answer + [eos] * rest
        assert set(tokens[equals + 1 :]) <= {eos}
        assert n_loops == needed
        lengths.add(int(n_loops))
    assert {1, 6} <= lengths


@pytest.mark.parametrize("name", FAN)
def test_default_lengths_are_those_of_the_released_configurations(name):
    longest = {"parity": 20, "multiplication": 11}.get(name, 19)
    assert make_task(name).max_length == longest


def test_curriculum_grows_by_one_and_the_tensors_with_it():
    task = make_task("copy", max_length=5, curriculum_interval=10)
    assert [task.longest(s) for s in (0, 9, 10, 25, 39, 40, 1000)] == [1, 1, 2, 3, 4, 5, 5]
    assert task.batch(4, 0).tokens.shape == (4, 6)
    assert task.batch(4, 1000).tokens.shape == (4, 14) == (4, task.max_seq_len)
    assert task.batch(4, 0, split="eval").tokens.shape == (4, 14)


def test_evaluation_at_a_length_beyond_training():
    task = make_task("parity", max_length=5, eval_length=9)
    assert task.max_seq_len == 11
    assert set(task.batch(16, 0, split="eval").n_loops.tolist()) == {9}
    assert task.batch(64, 0).n_loops.max() == 5


def test_every_fan_task_is_tested_here():
    assert set(FAN) == {name for name, task in TASKS.items() if issubclass(task, FullOutputTask)}


def test_markov_information_content_is_the_exact_one():
    task = make_task("markov", vocab=3, length=4, follow=0.8)
    sequences = np.array(list(itertools.product(range(3), repeat=4)))

    def likelihood(sequence, f):
        steps = [0.8 * (f[a] == b) + 0.2 / 3 for a, b in itertools.pairwise(sequence)]
        return np.prod(steps) / 3

    maps = list(itertools.product(range(3), repeat=3))
    probability = [
        0.5 * likelihood(s, task.language_map) + 0.5 * np.mean([likelihood(s, f) for f in maps])
        for s in sequences
    ]
    bits = task.information_content(sequences).sum(axis=1)
    np.testing.assert_allclose(bits, -np.log2(probability), rtol=1e-12)
    assert np.sum(2.0**-bits) == pytest.approx(1)


def test_markov_targets_are_the_next_tokens_and_groups_split_the_samples():
    task = make_task("markov")
    batch = task.batch(400, 0)
    assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    assert batch.group.float().mean() == pytest.approx(0.5, abs=0.08)
    # Complex samples are those that the language's own map does not explain.
    known = torch.from_numpy(task.language_map)[batch.tokens] == batch.targets
    simple = batch.group == 0
    assert known[simple].float().mean() > 0.7
    assert known[~simple].float().mean() < 0.4


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("hops", {}, "name"),
        ("hop", {"n_nodes": 1}, "n_nodes"),
        ("hop", {"max_hops": 0}, "max_hops"),
        ("hop", {"nodes": 5}, "options"),
        ("hop", {"seed": -1}, "seed"),
        ("p_hop", {"vocab": 1}, "vocab"),
        ("p_hop", {"length": 1.5}, "length"),
        ("markov", {"follow": 1.0}, "follow"),
        ("parity", {"max_length": 0}, "max_length"),
        ("copy", {"eval_length": -1}, "eval_length"),
        ("addition", {"curriculum_interval": True}, "curriculum_interval"),
    ],
)
def test_bad_options_are_named(name, options, named):
    with pytest.raises(ShiftInputError, match=f"'{named}'"):
        make_task(name, **options)


def test_an_unknown_split_is_named():
    with pytest.raises(ShiftInputError, match="'split'"):
        make_task("hop").batch(1, 0, split="test")
