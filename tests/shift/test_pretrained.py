"""LoopedTransformer in Hugging Face Transformers: the same tokens, from memory and from a folder."""

import json

import pytest
import torch
from test_generation import LENGTHS, PROMPTS, make
from tiny_runs import tiny

transformers = pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from shift import export, generate  # noqa: E402
from shift.config import ModelConfig, TaskConfig  # noqa: E402
from shift.data import main as make_data  # noqa: E402
from shift.model import Layout  # noqa: E402
from shift.pretrained import LoopedForCausalLM, pretrained  # noqa: E402
from shift.run.trainer import Trainer  # noqa: E402
from shift_kernels import ShiftInputError  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default::shift_kernels.BackendFallbackWarning")
LAYOUTS = [Layout(), Layout(n_prelude=1, n_coda=1, logit_softcap=5.0, initial_state="learned")]


def left_padded():
    tokens, mask = torch.zeros_like(PROMPTS), torch.zeros_like(PROMPTS)
    for row, n in enumerate(LENGTHS.tolist()):
        tokens[row, -n:], mask[row, -n:] = PROMPTS[row, :n], 1
    return {"input_ids": tokens, "attention_mask": mask}


@pytest.mark.parametrize("layout", LAYOUTS, ids=["loop", "around"])
def test_it_generates_the_models_own_tokens_from_left_padded_prompts(layout, tmp_path):
    model = make(layout)
    theirs = pretrained(model, n_loops=3)
    settings = dict(max_new_tokens=12, do_sample=False)
    expected = {t: model.generate(PROMPTS, t, 12, seq_lens=LENGTHS) for t in (1, 3)}
    assert not torch.equal(expected[1], expected[3])
    theirs.save_pretrained(tmp_path)
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".safetensors"}
    for found in (theirs, AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert isinstance(found, LoopedForCausalLM)
        assert torch.equal(found.generate(**left_padded(), **settings)[:, 4:], expected[3])
        assert torch.equal(found.generate(**left_padded(), **settings, n_loops=1)[:, 4:], expected[1])
    beams = [theirs.generate(**left_padded(), **settings, num_beams=3, use_cache=c) for c in (True, False)]
    assert torch.equal(*beams)


def test_it_trains_the_models_own_parameters():
    model = make()
    theirs = pretrained(model, n_loops=2).train()
    theirs(PROMPTS, labels=PROMPTS).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    logits = model(PROMPTS, 2)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), PROMPTS[:, 1:].flatten())
    (grad,) = torch.autograd.grad(loss, model.tokens.weight)
    torch.testing.assert_close(model.tokens.weight.grad, grad)


@pytest.mark.parametrize(
    "options", [dict(n_classes=5), dict(n_contexts=2), dict(spec=dict(causal=False))], ids=str
)
def test_a_model_that_predicts_no_next_token_is_refused(options):
    with pytest.raises(ShiftInputError, match="causal model whose classes"):
        pretrained(make(**options), n_loops=2)


def test_positions_that_do_not_begin_at_0_are_refused():
    with pytest.raises(ShiftInputError, match="begin at 0"):
        pretrained(make(), 2)(PROMPTS, position_ids=torch.arange(4, 8)[None], use_cache=False)


def test_an_exported_run_says_what_shift_generate_says(tmp_path, capsys):
    text = tmp_path / "text.jsonl"
    lines = [json.dumps({"text": f"{i} rounds of a rondo, and around a rondo goes. " * 3}) for i in range(30)]
    text.write_text("\n".join(lines))
    assert make_data([str(text), "--out", str(tmp_path / "data"), "--validation", "0.3"]) == 0
    task = TaskConfig("tokens", options={"path": str(tmp_path / "data"), "seq_len": 32})
    run = tmp_path / "run"
    Trainer(
        tiny(task=task, eval_samples=1, model=ModelConfig(n_loops=2, d_model=16, n_heads=2, d_ff=32)), run
    ).fit()
    out = tmp_path / "exported"
    assert export.main([str(run), "--out", str(out)]) == 0
    capsys.readouterr()
    assert generate.main([str(run), "--prompt", "a ro", "--temperature", "0", "--max-new-tokens", "8"]) == 0
    said = capsys.readouterr().out.removesuffix("\n")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 256
    prompt = tokenizer(tokenizer.bos_token + "a ro", return_tensors="pt")
    assert prompt.input_ids.tolist() == [[256, *b"a ro"]]
    tokens = model.generate(
        prompt.input_ids,
        attention_mask=prompt.attention_mask,
        max_new_tokens=8,
        do_sample=False,
        pad_token_id=0,
    )
    assert tokenizer.decode(tokens[0], skip_special_tokens=True) == said
    for taken in (out, text):
        assert export.main([str(run), "--out", str(taken)]) == 2
        assert "empty folder" in capsys.readouterr().err
