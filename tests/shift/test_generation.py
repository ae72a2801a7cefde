"""Generation: with its caches it gives the tokens that computing everything anew gives."""

import pytest
import torch
from tiny_runs import tiny

from shift.config import ScheduleConfig, TaskConfig
from shift.generate import main
from shift.generation import Sampling
from shift.model import Layout, LoopedTransformer
from shift.run.trainer import Trainer, TrainingInterrupted
from shift.tasks import Text
from shift.trained import newest, trained_loops
from shift_kernels import BlockSpec, ShiftInputError

pytestmark = pytest.mark.filterwarnings("default::shift_kernels.BackendFallbackWarning")
PROMPTS, LENGTHS = torch.tensor([[3, 1, 4, 1], [5, 2, 0, 0], [6, 0, 0, 0]]), torch.tensor([4, 2, 1])


def make(layout=None, **options):
    torch.manual_seed(0)
    spec = {"d_model": 16, "n_heads": 2, "d_ff": 32, "injection": "add", **options.pop("spec", {})}
    sizes = {"vocab_size": 9, "n_classes": 9, "max_seq_len": 64, **options}
    model = LoopedTransformer(BlockSpec(**spec), layout=layout, **sizes).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.5 * torch.randn_like(p))  # so that no token is always the likeliest
    return model


def one_by_one(model, n_loops, n_new):
    """The likeliest tokens, each sample for itself and everything anew for each."""
    rows = []
    for b, (prompt, n) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        text = prompt[:n]
        loops = n_loops[b : b + 1] if isinstance(n_loops, torch.Tensor) else n_loops
        for _ in range(n_new):
            text = torch.cat([text, model(text[None], loops)[:, -1].argmax(-1)])
        rows.append(text[n:])
    return torch.stack(rows)


@pytest.mark.parametrize(
    "layout",
    [Layout(), Layout(n_prelude=1, n_coda=1, initial_state="learned")],
    ids=["loop", "around"],
)
@pytest.mark.parametrize("positions", [dict(), dict(learned_positions=False, spec=dict(position="rope"))])
@pytest.mark.parametrize("n_loops", [1, 4, torch.tensor([1, 3, 2])], ids=str)
def test_greedy_tokens_are_those_of_computing_everything_anew(n_loops, positions, layout):
    model = make(layout, **positions)
    found = model.generate(PROMPTS, n_loops, 12, seq_lens=LENGTHS)
    expected = one_by_one(model, n_loops, 12)
    assert torch.equal(found, expected)
    assert len(expected.unique()) > 1


def test_a_sample_that_halts_is_computed_without_a_cache():
    model = make()
    found = model.generate(PROMPTS, 8, 6, seq_lens=LENGTHS, halt_threshold=1e-9)
    assert torch.equal(found, one_by_one(model, 8, 6))
    early = model.generate(PROMPTS, 8, 6, seq_lens=LENGTHS, halt_threshold=1e9)
    assert torch.equal(early, one_by_one(model, 2, 6))  # it has settled once it has moved


def test_a_sample_ends_at_a_stop_and_all_ended_end_it():
    model = make()
    free = model.generate(PROMPTS, 2, 24, seq_lens=LENGTHS)
    stops = {int(free[0, 3]), int(free[1, 5])}
    found = model.generate(PROMPTS, 2, 24, seq_lens=LENGTHS, stop=stops)
    for row, was in zip(found.tolist(), free.tolist(), strict=True):
        end = next((i for i, token in enumerate(was) if token in stops), 24)
        assert row == (was[: end + 1] + [was[min(end, 23)]] * 24)[: len(row)]
    ends = [next((i for i, t in enumerate(row) if t in stops), 23) for row in free.tolist()]
    assert found.shape[1] == max(ends) + 1


def test_drawn_tokens_follow_the_seed_and_keep_to_the_likeliest():
    model = make()

    def drawn(seed, **options):
        generator = torch.Generator().manual_seed(seed)
        return model.generate(PROMPTS, 2, 20, seq_lens=LENGTHS, generator=generator, **options)

    assert torch.equal(drawn(0, temperature=1.0), drawn(0, temperature=1.0))
    assert not torch.equal(drawn(0, temperature=1.0), drawn(1, temperature=1.0))
    assert torch.equal(drawn(0, temperature=2.0, top_k=1), drawn(1))
    for cold in (1e-3, 1e-45, 1e-300):
        assert torch.equal(drawn(0, temperature=cold), drawn(1))
    two = drawn(0, temperature=100.0, top_k=2)
    for b, n in enumerate(LENGTHS.tolist()):
        text = torch.cat([PROMPTS[b, :n], two[b]])
        likeliest = model(text[None], 2)[0, n - 1 : -1].topk(2).indices
        assert (likeliest == two[b][:, None]).any(1).all()


@pytest.mark.parametrize(
    ("options", "left"),
    [
        (dict(), {0, 1, 2, 3}),
        (dict(top_p=1.0), {0, 1, 2, 3}),
        (dict(top_p=0.85), {1, 2, 3}),
        (dict(top_p=0.7), {1, 3}),
        (dict(top_p=1e-9), {3}),
        (dict(top_k=2, top_p=0.6), {3}),  # of the two that are left, it has 0.625
        (dict(temperature=1e3, top_p=0.6), {1, 2, 3}),  # hot, all have the same
    ],
)
def test_the_nucleus_is_as_few_tokens_as_have_the_probability(options, left):
    chances = torch.tensor([0.05, 0.3, 0.15, 0.5])
    sampling = Sampling(**{"temperature": 1.0, "generator": torch.Generator().manual_seed(0), **options})
    sampling.check()
    drawn = sampling.choose(chances.log().expand(2000, 4))
    assert set(drawn.tolist()) == left
    if options.get("temperature", 1) == 1:  # with the chances that they had
        wanted = chances * torch.tensor([float(token in left) for token in range(4)])
        torch.testing.assert_close(
            drawn.bincount(minlength=4) / 2000, wanted / wanted.sum(), atol=0.05, rtol=0
        )


CALLS = {
    "no nucleus": (lambda: make().generate(PROMPTS, 2, 3, temperature=1, top_p=0.0), "top_p"),
    "more than all": (lambda: make().generate(PROMPTS, 2, 3, temperature=1, top_p=1.5), "top_p"),
    "too many": (lambda: make().generate(PROMPTS, 2, 61), "max_new_tokens.*60"),
    "no prompt": (lambda: make().generate(PROMPTS[:, :0], 2, 3), "tokens"),
    "no lengths": (lambda: make().generate(PROMPTS, 2, 3, seq_lens=torch.tensor([4, 0, 1])), "seq_lens"),
    "floats": (lambda: make().generate(PROMPTS.float(), 2, 3), "tokens.*int64"),
    "colder than cold": (lambda: make().generate(PROMPTS, 2, 3, temperature=-1), "temperature"),
    "none to draw": (lambda: make().generate(PROMPTS, 2, 3, temperature=1, top_k=0), "top_k"),
    "ids beyond the vocabulary": (lambda: make().generate(PROMPTS + 5, 2, 3), "tokens.* = 11 .*0 to 8"),
    "a stop beyond it": (lambda: make().generate(PROMPTS, 2, 3, stop=[300]), "stop.*from 0 to 8"),
    "a stop that is no id": (lambda: make().generate(PROMPTS, 2, 3, stop=1.5), "stop"),
    "nothing that draws": (lambda: make().generate(PROMPTS, 2, 3, temperature=1, generator=3), "generator"),
    "not causal": (lambda: make(spec=dict(causal=False)).generate(PROMPTS, 2, 3), "causal"),
    "other classes": (lambda: make(n_classes=5).generate(PROMPTS, 2, 3), "5 classes.*9"),
}


@pytest.mark.parametrize("kind", CALLS)
def test_bad_input_is_named(kind):
    call, words = CALLS[kind]
    with pytest.raises(ShiftInputError, match=words):
        call()


def test_the_command_goes_on_from_a_prompt(tmp_path, capsys):
    run = tmp_path / "run"
    Trainer(tiny(task=TaskConfig("text", options={"length": 16}), eval_samples=4), run).fit()
    arguments = [str(run), "--prompt", "def f", "--max-new-tokens", "6"]
    assert main(arguments) == 0
    first = capsys.readouterr().out.removesuffix("\n")
    assert first.startswith("def f")
    assert len(first) == len("def f") + 6
    assert main([*arguments, "--seed", "1"]) == 0
    assert capsys.readouterr().out.removesuffix("\n") != first
    assert main([*arguments, "--top-p", "1e-9", "--seed", "2"]) == 0
    assert main([*arguments, "--temperature", "0"]) == 0
    nucleus, likeliest = capsys.readouterr().out.removesuffix("\n").split("\ndef f")
    assert nucleus == "def f" + likeliest
    assert main([*arguments[:-1], "60"]) == 2
    assert "max_new_tokens" in capsys.readouterr().err
    for prompt in ("x" * 16, "a\udcff"):
        assert main([str(run), "--prompt", prompt]) == 2
        assert "'prompt'" in capsys.readouterr().err
    newest = max((run / "checkpoints").iterdir())
    (newest / "model.safetensors").write_bytes(b"")
    assert main(arguments) == 0
    assert "damaged" in capsys.readouterr().err
    assert main([str(tmp_path), "--prompt", "x"]) == 2
    assert "run_dir" in capsys.readouterr().err


def test_it_runs_as_many_loops_as_the_last_step_did(tmp_path):
    task, schedule = TaskConfig("text", options={"length": 16}), ScheduleConfig("fixed", {"at": 3})
    trainer = Trainer(tiny(task=task, schedule=schedule, eval_every=0, eval_samples=4), tmp_path)
    with pytest.raises(TrainingInterrupted):
        trainer.fit(lambda done, _: trainer.stop() if done == 5 else None)
    assert trained_loops(newest("test", tmp_path)[1]) == 3


def test_text_becomes_ids_and_text_again():
    text = "if x:\n\treturn 'é'"
    assert Text.decode(Text.encode(text).tolist()) == "if x:\n\ufffdreturn '\ufffd'"
