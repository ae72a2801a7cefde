"""Every task: its format by hand-written examples, its answers by a slow second solution, its order."""

import itertools

import numpy as np
import pytest
import torch
from token_data import token_folder

from shift.tasks import IGNORE, TASKS, make_task
from shift.tasks.full_output import FullOutputTask
from shift.tasks.p_hop import PHop
from shift_kernels import ShiftInputError

X = IGNORE
every_task = pytest.mark.parametrize("name", TASKS)


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """make_task, with the options without which a task does not work."""
    folder = str(token_folder(tmp_path_factory.mktemp("tokens")))
    needed = {"tokens": dict(path=folder, seq_len=16)}
    return lambda name, **options: make_task(name, **needed.get(name, {}), **options)


def same(a, b):
    pairs = zip(vars(a).values(), vars(b).values(), strict=True)
    return all((x is None and y is None) or torch.equal(x, y) for x, y in pairs)


@every_task
def test_a_batch_depends_on_seed_split_step_and_rank_alone(name, make):
    first, second = make(name, seed=3), make(name, seed=3)
    keys = [(step, split, rank) for step in (0, 7) for split in ("train", "eval") for rank in (0, 1)]
    batches = {key: first.batch(8, key[0], split=key[1], rank=key[2]) for key in keys}
    for key in reversed(keys):
        assert same(second.batch(8, key[0], split=key[1], rank=key[2]), batches[key]), key
    for a, b in itertools.combinations(keys, 2):
        assert not torch.equal(batches[a].tokens, batches[b].tokens), (a, b)
    assert not torch.equal(make(name, seed=4).batch(8, 0).tokens, batches[0, "train", 0].tokens)


@every_task
def test_sizes_are_kept(name, make):
    task = make(name)
    for step in range(5):
        batch = task.batch(32, step)
        read = batch.targets != IGNORE
        assert batch.tokens.shape == batch.targets.shape == batch.group.shape
        assert batch.tokens.shape[1] <= task.max_seq_len
        assert set(batch.tokens.flatten().tolist()) <= set(range(task.vocab_size))
        assert set(batch.targets[read].tolist()) <= set(range(task.n_classes))
        assert torch.equal(batch.group == -1, ~read)
        assert set(batch.group[read].tolist()) <= set(range(len(task.group_names)))
        assert (batch.context is None) == (task.n_contexts == 0)
        if batch.context is not None:
            assert set(batch.context.tolist()) <= set(range(task.n_contexts))
        assert all(x is None or x.dtype == torch.int64 for x in vars(batch).values())


class Scripted:
    """A random generator that says what it is told to, one item a call."""

    def __init__(self, draws):
        self.draws = iter(draws)

    def integers(self, *args, **kwargs):
        return np.array(next(self.draws))

    random = permuted = integers


def test_hop_by_hand():
    f = [2, 0, 3, 1, 4]
    task = make_task("hop", n_nodes=5, max_hops=3)
    batch = task.sample(Scripted([[f, f, f], [0, 1, 2]]), 3, 0, "train")
    assert batch.tokens.tolist() == [f, f, f]
    assert batch.targets.tolist() == [[2, 0, 3, 1, 4], [3, 2, 1, 0, 4], [1, 3, 0, 2, 4]]
    assert batch.group.tolist() == [[0] * 5, [1] * 5, [2] * 5]
    assert batch.context.tolist() == [0, 1, 2]
    assert batch.n_loops is None


def test_hop_answers_by_a_slow_walk():
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
    tokens = np.array([[0, 1, 0, 2, 1, 0], [1, 1, 1, 0, 0, 1]])
    assert PHop.find(tokens).tolist() == [[-1, -1, 1, -1, 2, 3], [-1, 1, 2, -1, 4, 3]]


def test_p_hop_by_hand():
    tokens = [0, 1, 0, 2, 1, 0]
    task = make_task("p_hop", vocab=3, length=6, max_hops=3)
    batch = task.sample(Scripted([[tokens] * 3, [0, 1, 2]]), 3, 0, "train")
    assert batch.tokens.tolist() == [tokens] * 3
    assert batch.targets.tolist() == [[X, X, 1, X, 0, 2], [X, X, X, X, 1, X], [X] * 6]
    assert batch.group.tolist() == [[-1, -1, 0, -1, 0, 0], [-1, -1, -1, -1, 1, -1], [-1] * 6]
    assert batch.context.tolist() == [0, 1, 2]


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


def test_both_short_factors_occur_in_multiplication():
    questions = make_task("multiplication").batch(64, 0).tokens.tolist()
    assert {tokens.index(2) for tokens in questions} == {1, 2}


@pytest.mark.parametrize("name", FAN)
@pytest.mark.parametrize("longest", [1, 2, 3, 100])
def test_the_longest_sample_fits_its_tensor_with_an_end(name, longest):
    task = make_task(name, eval_length=longest)
    batch = task.batch(16, 0, split="eval")
    assert batch.tokens.shape == (16, task.width(longest))
    assert (batch.targets[:, -1] == task.eos).all()


def test_binary_sum_counts_as_far_as_its_tensor_reaches():
    task = make_task("binary_sum", eval_length=511)
    batch = task.sample(Scripted([[511], [1] * 511]), 1, 0, "eval")
    assert batch.targets.tolist() == [[X] * 511 + [1] * 9]


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


def test_markov_by_hand():
    task = make_task("markov", vocab=3, length=4, follow=0.9)
    task.language_map = np.array([2, 2, 0])
    own_maps, kinds = [[1, 2, 0], [0, 0, 0]], [0.7, 0.2]  # the first follows its own map
    noise, luck = [[2, 0, 0, 1, 1], [0, 0, 0, 1, 1]], [[0.0, 0.1, 0.1, 0.95, 0.1]] * 2
    batch = task.sample(Scripted([own_maps, kinds, noise, luck]), 2, 0, "train")
    assert batch.tokens.tolist() == [[2, 0, 1, 1], [0, 2, 0, 1]]
    assert batch.targets.tolist() == [[0, 1, 1, 2], [2, 0, 1, 2]]
    assert (batch.context, batch.n_loops) == (None, None)


def test_markov_ceiling_is_how_often_the_map_is_right():
    task = make_task("markov", length=500)
    assert task.ceiling == pytest.approx(0.9125)
    sequences = task.sequences(np.random.default_rng(0), 400)
    followed = (task.language_map[sequences[:, :-1]] == sequences[:, 1:]).mean(axis=1)
    # Few sequences with a map of their own agree with the language's by chance as often as this.
    assert followed[followed > 0.86].mean() == pytest.approx(task.ceiling, abs=0.005)


def test_markov_information_content_of_long_sequences_is_finite():
    task = make_task("markov", length=800)
    bits = task.information_content(np.zeros((1, 800), dtype=np.int64))
    # A state that always leads to itself is soon known to: all that is left is the chance to stray.
    assert bits[0, -1] == pytest.approx(-np.log2(task.ceiling))


def test_markov_information_content_is_the_exact_one():
    task = make_task("markov", vocab=3, length=4, follow=0.8)
    sequences = np.array(list(itertools.product(range(3), repeat=4)))

    def likelihood(sequence, f):
        steps = [0.8 * (f[a] == b) + 0.2 / 3 for a, b in itertools.pairwise(sequence)]
        return np.prod(steps) / 3

    maps = list(itertools.product(range(3), repeat=3))
    bits = task.information_content(sequences)
    for length in range(1, 5):  # of a prefix: so that every token's own bits are right, not just their sum
        probability = [
            0.5 * likelihood(s, task.language_map) + 0.5 * np.mean([likelihood(s, f) for f in maps])
            for s in sequences[:, :length]
        ]
        np.testing.assert_allclose(bits[:, :length].sum(axis=1), -np.log2(probability), rtol=1e-12)
    assert np.sum(2.0 ** -bits.sum(axis=1)) == pytest.approx(1)


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
        ("binary_sum", {"max_length": 512}, "max_length"),
        ("binary_sum", {"eval_length": 512}, "eval_length"),
    ],
)
def test_bad_options_are_named(name, options, named):
    with pytest.raises(ShiftInputError, match=f"'{named}'"):
        make_task(name, **options)


@pytest.mark.parametrize(
    "bad", [{"split": "test"}, {"batch_size": 0}, {"step": -1}, {"step": 1.5}, {"rank": -1}]
)
def test_bad_arguments_of_a_batch_are_named(bad):
    with pytest.raises(ShiftInputError, match=f"'{next(iter(bad))}'"):
        make_task("hop").batch(**{"batch_size": 1, "step": 0, **bad})


def test_prefix_products_by_hand():
    # In lexicographic order: 0 (0,1,2), 1 (0,2,1), 2 (1,0,2), 3 (1,2,0), 4 (2,0,1), 5 (2,1,0).
    task = make_task("prefix_products", n_items=3, length=4)
    batch = task.sample(Scripted([[[1, 2, 3, 5], [0, 4, 4, 4]]]), 2, 0, "train")
    assert batch.targets.tolist() == [[1, 3, 4, 1], [0, 4, 3, 0]]
    assert batch.group.tolist() == [[0, 1, 2, 3]] * 2


def test_prefix_products_by_permutation_matrices():
    task = make_task("prefix_products", n_items=4, length=9)
    matrices = [torch.eye(4)[list(p)] for p in itertools.permutations(range(4))]
    batch = task.batch(20, 0)
    for tokens, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
        product = torch.eye(4)
        for token, target in zip(tokens, targets, strict=True):
            product = product @ matrices[token]
            assert torch.equal(product, matrices[target])


def test_text_is_the_standard_library_and_the_held_out_part_is_never_trained_on():
    task = make_task("text", length=40)
    read = lambda ids: "".join(chr(i + 32) if i < 95 else "\n" if i == 95 else "\0" for i in ids)  # noqa: E731
    whole = read(task.characters.tolist())
    assert "def " in whole
    assert "\nimport " in whole
    cut = task.bounds["train"][1]
    for split, part in (("train", whole[:cut]), ("eval", whole[cut:])):
        batch = task.batch(50, 0, split=split)
        for tokens, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
            assert read([*tokens, targets[-1]]) in part
            assert tokens[1:] == targets[:-1]


def test_a_misspelt_option_is_told_beside_those_that_there_are():
    with pytest.raises(ShiftInputError, match=r"n_nodes, max_hops.*Perhaps 'max_hops'"):
        make_task("hop", max_hop=3)
