"""shift-data and the task tokens: no document is lost, and what is damaged is found before training."""

import builtins
import json
import math
import shutil

import numpy as np
import pytest
import tomli_w
import torch
from tiny_runs import tiny
from token_data import documents, token_folder

from shift import compare, data, export, generate, train
from shift import eval as evaluation
from shift.build import build_model, build_task
from shift.config import ModelConfig, TaskConfig, TrainConfig, load_config
from shift.landscape.hessian import LossSurface
from shift.run.evaluate import evaluate
from shift.run.trainer import Trainer, TrainingInterrupted
from shift.tasks import Task, find_task, make_task
from shift.tasks.shards import HEADER_BYTES, Header, TokenFolder
from shift.tokens.documents import Sources
from shift.tokens.prepare import Settings, is_held_out, prepare
from shift.tokens.tokenizer import ByteTokenizer, load_tokenizer, read_tokenizer, train_bpe
from shift_kernels import ShiftInputError, extras

SEPARATOR = ByteTokenizer.separator


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return token_folder(tmp_path_factory.mktemp("data"))


@pytest.fixture
def folder(made, tmp_path):
    """A copy that a test may ruin."""
    return shutil.copytree(made, tmp_path / "tokens")


def all_tokens(folder, split):
    return np.concatenate([shard.tokens for shard in TokenFolder.open(folder).shards[split]])


def texts_of(folder, split):
    tokens, tokenizer = all_tokens(folder, split), load_tokenizer(folder)
    assert tokens[0] == tokenizer.separator
    return [tokenizer.decode(part[1:]) for part in np.split(tokens, np.flatnonzero(tokens == SEPARATOR))[1:]]


def test_every_document_is_in_one_split_whole_and_in_order(made):
    train, held_out = texts_of(made, "train"), texts_of(made, "eval")
    assert train == [text for text in documents() if not is_held_out(text, 0.3)]
    assert held_out == [text for text in documents() if is_held_out(text, 0.3)]
    assert len(TokenFolder.open(made).shards["train"]) > 1


def test_the_share_that_is_held_out_is_about_what_was_asked_for():
    held_out = sum(is_held_out(str(i), 0.2) for i in range(2000))
    assert 340 < held_out < 460  # 3.4 standard deviations


def test_the_folder_depends_on_no_number_of_threads(made, tmp_path, monkeypatch):
    monkeypatch.setattr("shift.tokens.prepare.CHUNK_CHARACTERS", 300)
    again = token_folder(tmp_path, jobs=3)
    names = sorted(path.name for path in made.iterdir())
    assert names == sorted(path.name for path in again.iterdir())
    assert all((made / name).read_bytes() == (again / name).read_bytes() for name in names)


def test_the_header_is_one_line_that_tells_what_follows(made):
    path = next(made.glob("eval-*.bin"))
    line, tokens = path.read_bytes()[:HEADER_BYTES], path.read_bytes()[HEADER_BYTES:]
    assert line.endswith(b" \n")
    header = Header(**json.loads(line))
    assert (header.dtype, header.vocab_size, header.n_tokens) == ("<u2", 257, len(tokens) // 2)


def test_a_vocabulary_beyond_16_bits_has_wider_tokens(tmp_path):
    class Wide(ByteTokenizer):
        vocab_size, separator = 70_000, 69_999

        def encode(self, texts):
            return [ids.astype("<u4") for ids in super().encode(texts)]

    source = tmp_path / "documents.txt"
    source.write_text("\f".join(documents()))
    prepare(Sources([source], split_on="\f"), Wide(), tmp_path / "tokens", Settings(0.3))
    task = make_task("tokens", path=str(tmp_path / "tokens"), seq_len=64)
    (shard,) = task.folder.shards["train"]
    assert (shard.header.dtype, shard.tokens.dtype) == ("<u4", np.dtype("<u4"))
    assert (task.batch(8, 0).tokens == 69_999).any()


def lines(path, texts):
    path.write_text("".join(json.dumps({"body": text, "n": 1}) + "\n" for text in texts))


def table(path, texts):
    pyarrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    parquet.write_table(pyarrow.table({"n": list(range(len(texts))), "body": texts}), path)


def one_file_each(path, texts):
    path.mkdir()
    for i, text in enumerate(texts):
        (path / f"{i:03d}.txt").write_text(text)


@pytest.mark.parametrize(("name", "write"), [("a.jsonl", lines), ("a.parquet", table), ("a", one_file_each)])
def test_kinds_of_sources_hold_the_same_documents(name, write, tmp_path, made, capsys):
    write(tmp_path / name, documents())
    field = ["--field", "body"] if (tmp_path / name).is_file() else []
    flags = ["--out", str(tmp_path / "out"), *field, "--validation", "0.3"]
    assert data.main([str(tmp_path / name), *flags]) == 0
    assert "documents" in capsys.readouterr().out
    assert all(texts_of(tmp_path / "out", s) == texts_of(made, s) for s in ("train", "eval"))


def test_a_bpe_gives_back_every_text_and_makes_no_separator_of_one():
    pytest.importorskip("tokenizers")
    tokenizer = train_bpe(documents(), 300)
    texts = ["loop block", "Ünïcode 🙂\n\ttabs", "<|endoftext|>", ""]
    encoded = tokenizer.encode(texts)
    assert [tokenizer.decode(ids) for ids in encoded] == texts
    assert all(tokenizer.separator not in ids for ids in encoded)
    assert tokenizer.vocab_size <= 300
    assert len(encoded[0]) < len(texts[0])


def test_a_bpe_is_learned_from_training_documents_and_read_back(tmp_path):
    pytest.importorskip("tokenizers")
    lines(tmp_path / "a.jsonl", documents())
    flags = [str(tmp_path / "a.jsonl"), "--field", "body", "--validation", "0.3"]
    out = [tmp_path / "first", tmp_path / "second"]
    assert data.main([*flags, "--tokenizer", "bpe", "--vocab-size", "300", "--out", str(out[0])]) == 0
    tokenizer = str(out[0] / "tokenizer.json")
    assert data.main([*flags, "--tokenizer", tokenizer, "--out", str(out[1])]) == 0
    assert all((out[1] / p.name).read_bytes() == p.read_bytes() for p in out[0].iterdir())
    first = next(text for text in documents() if not is_held_out(text, 0.3))
    ids = all_tokens(out[0], "train")
    assert load_tokenizer(out[0]).decode(ids[1 : np.flatnonzero(ids == 0)[1]]) == first


@pytest.mark.parametrize(
    ("content", "flags", "words"),
    [
        ({"a.jsonl": "{"}, [], "line 1"),
        ({"a.jsonl": '{"text": 3}\n'}, [], "is no text"),
        ({"a.jsonl": '{"body": "x"}\n'}, [], "no field 'text'"),
        ({"a.txt": b"\xff\xfe"}, [], "UTF-16"),
        ({"a.parquet": b"PAR"}, [], "a.parquet"),
        ({"a.png": "x"}, [], "a folder with files"),
        ({"a.txt": "alone"}, [], "got none"),
        ({"a.txt": "x"}, ["--vocab-size", "300"], "'vocab_size' = 300"),
        ({"a.txt": "x"}, ["--bpe-characters", "300"], "'bpe_characters' = 300"),
        ({"a.txt": "x"}, ["--field", "body"], "'field' = 'body'"),
        ({"a.jsonl": '{"text": "x"}'}, ["--split-on", "-"], "'split_on' = '-'"),
        ({"a.txt": "x"}, ["--tokenizer", "nowhere.json"], "nowhere.json"),
        ({"a.txt": "x", "t.json": "{}"}, ["--tokenizer", "t.json"], "Cannot instantiate Tokenizer"),
        ({"a.txt": "x"}, ["--validation", "1"], "'validation' = 1.0"),
        ({"a.txt": "x"}, ["--separator", "FOO"], "'separator' = 'FOO'"),
        ({"a.txt": "x"}, ["--jobs", "0"], "'jobs' = 0"),
        ({"a.txt": "x"}, ["--tokenizer", "bpe", "--vocab-size", "256"], "'vocab_size' = 256"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(content, flags, words, tmp_path, monkeypatch, capsys):
    (tmp_path / "in").mkdir()
    for name, what in content.items():
        path = tmp_path / ("in" if name != "t.json" else "") / name
        path.write_bytes(what if isinstance(what, bytes) else what.encode())
    monkeypatch.chdir(tmp_path)
    assert data.main(["in", "--out", "out", *flags]) == 2
    said = capsys.readouterr().err.strip()
    assert words in said
    assert "\n" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "module"), [("a.parquet", "pyarrow"), ("a.txt", "tokenizers")])
def test_a_missing_extra_is_one_line(name, module, tmp_path, monkeypatch, capsys):
    real = builtins.__import__

    def without(wanted, *args, **kwargs):
        if wanted.partition(".")[0] == module:
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)
        return real(wanted, *args, **kwargs)

    (tmp_path / name).write_text("x")
    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr(extras, "_extras", lambda: {module: ("data",)})  # whatever is installed here
    assert data.main([str(tmp_path / name), "--out", str(tmp_path / "out"), "--tokenizer", "bpe"]) == 2
    said = capsys.readouterr().err.strip()
    assert f"needs {module}" in said
    assert "pip install 'shift-kernels[data]'" in said
    assert "\n" not in said


def test_finished_data_are_not_written_over_and_unfinished_ones_are(folder, tmp_path):
    sources = Sources([tmp_path / "documents.txt"], split_on="\f")
    sources.files[0].write_text("\f".join(documents()))
    with pytest.raises(ShiftInputError, match="'out'"):
        prepare(sources, ByteTokenizer(), folder, Settings(0.3))
    (folder / "data.json").unlink()
    (folder / "train-00009.bin").write_bytes(b"left over")
    with pytest.raises(ShiftInputError, match=r"eval-00000\.bin"):  # whose are these?
        prepare(sources, ByteTokenizer(), folder, Settings(0.3))
    (folder / ".unfinished").touch()
    prepare(sources, ByteTokenizer(), folder, Settings(0.3))
    assert texts_of(folder, "train") == [text for text in documents() if not is_held_out(text, 0.3)]
    assert not (folder / "train-00009.bin").exists()


@pytest.mark.parametrize("last", ["out", "x" * 300], ids=["no documents", "a name too long"])
def test_a_call_that_is_refused_leaves_none_of_the_folders_that_it_made(last, tmp_path):
    (tmp_path / "one.txt").write_text("one document")
    (tmp_path / "there").mkdir()
    out = tmp_path / "there" / "a" / "b" / last
    with pytest.raises(ShiftInputError, match="'validation'" if last == "out" else "'out'"):
        prepare(Sources([tmp_path / "one.txt"]), ByteTokenizer(), out, Settings(0.3))
    assert not list((tmp_path / "there").iterdir())


def test_one_process_writes_a_folder_at_a_time(tmp_path, monkeypatch):
    sources = Sources([tmp_path / "documents.txt"], split_on="\f")
    sources.files[0].write_text("\f".join(documents()))
    monkeypatch.setattr("shift.run.lock.take_lock", lambda path: None)  # as where another one has it
    with pytest.raises(ShiftInputError, match="no other shift-data"):
        prepare(sources, ByteTokenizer(), tmp_path / "out", Settings(0.3))


def test_a_separator_is_a_token_that_no_text_can_spell(tmp_path):
    pytest.importorskip("tokenizers")
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_bytes(train_bpe(documents(), 300).to_bytes())
    assert read_tokenizer(tokenizer, "<|endoftext|>").separator == 0
    with pytest.raises(ShiftInputError, match=r"separator.*special"):
        read_tokenizer(tokenizer, "a")


def test_a_run_goes_on_with_its_own_data_alone(folder, tmp_path):
    trainer = Trainer(config_of(folder), tmp_path / "run")
    with pytest.raises(TrainingInterrupted):
        trainer.fit(lambda done, _: trainer.stop() if done == 5 else None)
    shutil.rmtree(folder)
    (tmp_path / "other").mkdir()
    token_folder(tmp_path / "other", validation=0.5).rename(folder)
    with pytest.raises(ShiftInputError, match="'tokens' with the data"):
        Trainer(config_of(folder), tmp_path / "run", resume=True)


def cut(path):
    path.write_bytes(path.read_bytes()[:-3])


def other_header(path, **changes):
    header = json.loads(path.read_bytes()[:HEADER_BYTES]) | changes
    path.write_bytes(json.dumps(header).encode().ljust(HEADER_BYTES) + path.read_bytes()[HEADER_BYTES:])


DAMAGE = {
    "cut": (cut, "bytes that are not"),
    "gone": (lambda path: path.unlink(), "No such file"),
    "empty": (lambda path: path.write_bytes(b""), "Expecting value"),
    "another vocabulary": (lambda path: other_header(path, vocab_size=300), "another tokenizer"),
    "a count that is none": (lambda path: other_header(path, n_tokens=-1), "impossible"),
    "a count as text": (lambda path: other_header(path, n_tokens="3"), "other fields"),
    "other data": (lambda path: other_header(path, sha256="0"), "other data"),
    "another format": (lambda path: other_header(path, format="x"), "not a shard"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_shard_is_named_before_training(kind, folder, tmp_path):
    damage, words = DAMAGE[kind]
    damage(folder / "train-00000.bin")
    with pytest.raises(ShiftInputError, match=rf"train-00000\.bin.*{words}"):
        Trainer(config_of(folder), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_changed_tokens_are_found_when_asked_for(folder):
    path = folder / "train-00000.bin"
    path.write_bytes(path.read_bytes()[:-2] + b"\x00\x01")
    make_task("tokens", path=str(folder))
    with pytest.raises(ShiftInputError, match="sha256"):
        make_task("tokens", path=str(folder), verify=True)


def test_ids_beyond_the_vocabulary_are_refused(folder):
    path = folder / "train-00000.bin"
    path.write_bytes(path.read_bytes()[:HEADER_BYTES] + b"\xff" * (path.stat().st_size - HEADER_BYTES))
    task = make_task("tokens", path=str(folder), seq_len=16)
    with pytest.raises(ShiftInputError, match="ids are below 257"):
        task.batch(500, 0)


@pytest.mark.parametrize("names", [["../../etc-00000.bin"], ["train-00000.bin/.."], ["x.bin"]])
def test_an_index_names_no_file_outside(names, folder):
    index = json.loads((folder / "data.json").read_text()) | {"shards": dict.fromkeys(names, "x")}
    (folder / "data.json").write_text(json.dumps(index))
    with pytest.raises(ShiftInputError, match="names that are not those of shards"):
        make_task("tokens", path=str(folder))


def test_without_a_path_the_task_says_that_it_needs_one():
    with pytest.raises(ShiftInputError, match=r"'path' = ''.*no default.*--task.options path="):
        make_task("tokens")


def test_too_long_a_window_is_refused(made):
    with pytest.raises(ShiftInputError, match="'seq_len' = 100000"):
        make_task("tokens", path=str(made), seq_len=100_000)


def test_an_epoch_reads_every_window_once_whatever_the_ranks(made):
    task = make_task("tokens", seed=1, path=str(made), seq_len=16)
    stream = [shard.tokens for shard in TokenFolder.open(made).shards["train"]]
    windows = sorted(tuple(s[i : i + 16]) for s in stream for i in range(0, len(s) - 16, 16))
    one = [task.batch(1, step).tokens[0].tolist() for step in range(2 * len(windows))]
    epochs = one[: len(windows)], one[len(windows) :]
    assert all(sorted(map(tuple, epoch)) == windows for epoch in epochs)
    assert epochs[0] != epochs[1]
    dealt = [task.batch(2, step, rank=rank, n_ranks=3) for step in range(4) for rank in range(3)]
    assert torch.cat([batch.tokens for batch in dealt]).tolist() == one[:24]


def test_targets_are_the_next_tokens(made):
    batch = make_task("tokens", path=str(made), seq_len=16).batch(8, 0)
    assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])


def test_reading_ahead_changes_nothing(made):
    fresh = lambda: make_task("tokens", path=str(made), seq_len=16)  # noqa: E731
    task, steps = fresh(), [0, 1, 2, 7, 8, 3]
    for step in steps:
        assert torch.equal(task.batch(4, step).tokens, fresh().batch(4, step).tokens)
        assert torch.equal(task.batch(4, 0, split="eval").tokens, fresh().batch(4, 0, split="eval").tokens)


def packed_batch(made):
    return make_task("tokens", path=str(made), seq_len=64, packed=True).batch(6, 0)


def test_packed_sequences_begin_at_rows_and_separators(made):
    batch = packed_batch(made)
    starts = set(batch.cu_seqlens.tolist())
    flat = batch.tokens.flatten().tolist()
    assert starts == {i for i, token in enumerate(flat) if token == SEPARATOR or i % 64 == 0} | {len(flat)}
    for start, stop in ((0, 2), (2, 5), (4, 6)):
        part = batch.rows(start, stop)
        inside = [i - 64 * start for i in sorted(starts) if 64 * start <= i <= 64 * stop]
        assert part.cu_seqlens.tolist() == inside
        assert torch.equal(part.tokens, batch.tokens[start:stop])


def config_of(folder, **changes):
    options = {"path": str(folder), "seq_len": 64, **changes.pop("options", {})}
    return tiny(task=TaskConfig("tokens", options=options), **changes)


@pytest.mark.parametrize("injection", ["add", "none"])
def test_a_packed_document_sees_itself_alone(made, injection):
    config = config_of(
        made, model=ModelConfig(n_loops=2, d_model=16, n_heads=2, d_ff=32, injection=injection)
    )
    model, batch = build_model(config, build_task(config)), packed_batch(made)
    together = model(batch.tokens, 2, cu_seqlens=batch.cu_seqlens).flatten(0, 1)
    for start, stop in zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False):
        alone = model(batch.tokens.flatten()[start:stop][None], 2)[0]
        torch.testing.assert_close(together[start:stop], alone)


def test_a_landscape_of_packed_documents_is_that_of_their_loss(made):
    config = config_of(made, options={"packed": True})
    task = build_task(config)
    model, batch = build_model(config, task), task.batch(6, 0, split="eval")
    surface = LossSurface(model, batch, 2, dtype=torch.float32)
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    expected = evaluate(model, task, n_loops=2, n_samples=6, batch_size=6)["loss"]
    assert surface.loss(weights).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_training_on_tokens_reports_bits_per_byte(made, packed, tmp_path):
    result = Trainer(config_of(made, options={"packed": packed}), tmp_path / "run").fit()
    scores = result["final_eval"]
    totals = json.loads((made / "data.json").read_text())["splits"]["eval"]
    tokens_per_byte = totals["n_tokens"] / totals["n_bytes"]
    assert scores["bits_per_byte"] == pytest.approx(scores["loss"] / math.log(2) * tokens_per_byte)
    assert 0 < scores["loss"] < math.log(257) + 1


@pytest.mark.parametrize("packed", [False, True])
def test_an_evaluation_cut_to_size_scores_the_same(made, packed, monkeypatch):
    config = config_of(made, options={"packed": packed})
    task = build_task(config)
    model, how = build_model(config, task), dict(n_loops=2, n_samples=20, batch_size=8)
    whole = evaluate(model, task, **how)
    monkeypatch.setattr("shift.run.evaluate.LOGITS", 3 * 64 * 257)
    sizes = []
    model.register_forward_pre_hook(lambda _module, inputs: sizes.append(len(inputs[0])))
    cut = evaluate(model, task, **how)
    assert sizes == [3, 3, 2, 3, 3, 2, 3, 1]
    assert cut.keys() == whole.keys()
    assert cut["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert cut["accuracy"] == whole["accuracy"]


def test_a_sweep_over_loops_tells_bits_per_byte_without_the_logits_of_all_loops(made, tmp_path):
    config = config_of(made, options={"packed": True}, eval_samples=24)
    trainer = Trainer(config, tmp_path / "lm")
    trainer.fit()
    assert evaluation.main([str(tmp_path / "lm"), "--out", str(tmp_path / "eval"), "--samples", "24"]) == 0
    (found,) = json.loads((tmp_path / "eval/eval.json").read_text()).values()
    (row,) = found["rows"]
    for n_loops in (1, 3, 5):
        scores = evaluate(trainer.model, trainer.task, n_loops=n_loops, n_samples=24, batch_size=8)
        assert row["bits_per_byte"][n_loops - 1] == pytest.approx(scores["bits_per_byte"])
        assert row["accuracy"][n_loops - 1] == pytest.approx(scores["accuracy"])
    assert "| 3 | " in (tmp_path / "eval/eval.md").read_text()


def test_an_evaluation_overwrites_no_other_unless_told_to(made, tmp_path, capsys):
    Trainer(config_of(made), tmp_path / "lm").fit()
    call = [str(tmp_path / "lm"), "--out", str(tmp_path / "eval"), "--samples"]
    assert evaluation.main([*call, "8"]) == 0
    assert evaluation.main([*call, "4"]) == 2
    assert "a folder without eval.json and eval.md" in capsys.readouterr().err
    assert '"samples": 8' in (tmp_path / "eval/eval.json").read_text()
    assert evaluation.main([*call, "4", "--force"]) == 0
    assert '"samples": 4' in (tmp_path / "eval/eval.json").read_text()


def test_an_evaluation_of_text_keeps_no_picture_of_another_run(made, tmp_path):
    out = tmp_path / "eval"
    Trainer(tiny(), tmp_path / "hop").fit()
    Trainer(config_of(made), tmp_path / "lm").fit()
    assert evaluation.main([str(tmp_path / "hop"), "--out", str(out), "--samples", "8"]) == 0
    assert (out / "heat_map.png").exists()
    assert evaluation.main([str(tmp_path / "lm"), "--out", str(out), "--samples", "8", "--force"]) == 0
    assert {path.name for path in out.iterdir()} == {"eval.json", "eval.md"}


def run_on(folder, run):
    """A run on a folder of tokens, stopped after eight of its twelve steps."""
    trainer = Trainer(config_of(folder), run)
    with pytest.raises(TrainingInterrupted):
        trainer.fit(lambda done, _: trainer.stop() if done == 8 else None)


TOOLS = {
    "generate": lambda run, out: generate.main([str(run), "--prompt", "loop", "--max-new-tokens", "2"]),
    "eval": lambda run, out: evaluation.main([str(run), "--samples", "8", "--out", str(out)]),
    "export": lambda run, out: export.main([str(run), "--out", str(out)]),
}


@pytest.mark.parametrize("tool", TOOLS)
def test_other_data_than_the_runs_are_refused(tool, folder, tmp_path, capsys):
    run_on(folder, tmp_path / "run")
    shutil.rmtree(folder)
    (tmp_path / "other").mkdir()
    token_folder(tmp_path / "other", validation=0.4).rename(folder)
    if tool == "export":
        pytest.importorskip("transformers")
    assert TOOLS[tool](tmp_path / "run", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "the data " in said
    assert "where it lies now: --data NEW" in said
    assert not (tmp_path / "out").exists()


def test_data_that_moved_are_named_anew(folder, tmp_path, capsys):
    run, moved = tmp_path / "run", tmp_path / "moved"
    run_on(folder, run)
    folder.rename(moved)
    assert TOOLS["generate"](run, None) == 2
    assert "moved to: No such file" in capsys.readouterr().err
    now = ["--data", str(moved)]
    assert generate.main([str(run), "--prompt", "loop", "--max-new-tokens", "2", *now]) == 0
    assert evaluation.main([str(run), "--samples", "8", "--out", str(tmp_path / "eval"), *now]) == 0
    result = Trainer(config_of(moved), run, resume=True).fit()
    assert result["steps"] == 12
    (tmp_path / "other").mkdir()
    with pytest.raises(ShiftInputError, match=r"the data .*lies now: --task\.options path=NEW"):
        Trainer(config_of(token_folder(tmp_path / "other", validation=0.4)), run, resume=True)


def test_a_task_that_reads_no_files_takes_no_data(tmp_path, capsys):
    Trainer(tiny(), tmp_path / "run").fit()
    assert generate.main([str(tmp_path / "run"), "--prompt", "1", "--data", "x"]) == 2
    assert "reads no files" in capsys.readouterr().err


def test_the_command_keeps_the_path_of_data_from_the_root(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--run-dir", "run", "--task.name", "tokens", "--task.options", "path=tokens"]
    assert train.parse(words).train.task.options["path"] == str(folder)


def test_a_comparison_keeps_the_path_of_data_from_the_root(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = tmp_path / "base.toml"
    base.write_bytes(tomli_w.dumps(config_of("tokens").to_dict()).encode())
    call = ["--config", str(base), "--seeds", "0", "--target", "0.9", "--out", "out", "--jobs", "1"]
    assert compare.main([*call, "--arms", "looped"]) == 0
    own = tmp_path / "out" / "looped" / "seed-0" / "config.toml"
    assert load_config(own).task.options["path"] == str(folder)
    # Runs of older versions have it as it was given; they are taken up, and fair beside new ones.
    own.write_text(own.read_text().replace(str(folder), "tokens"))
    before = own.with_name("result.json").read_bytes()
    assert compare.main([*call, "--arms", "looped", "single"]) == 0
    assert own.with_name("result.json").read_bytes() == before
    rules = json.loads((tmp_path / "out" / "results.json").read_text())["fairness"]
    assert next(rule["ok"] for rule in rules if rule["rule"].startswith("Same model"))


def test_a_run_of_an_older_version_with_a_path_as_it_was_given_goes_on(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as older:
        older.setattr("shift.run.trainer.with_absolute_paths", lambda config: config)
        run_on("tokens", tmp_path / "run")
    assert Trainer(config_of("tokens"), "run", resume=True).fit()["steps"] == 12
    assert load_config(tmp_path / "run" / "config.toml").task.options["path"] == str(folder)


def test_a_task_without_text_has_no_bits_per_byte():
    config = tiny()
    task = build_task(config)
    scores = evaluate(build_model(config, task), task, n_loops=1, n_samples=8, batch_size=8)
    assert "bits_per_byte" not in scores


class Ours(Task):
    """For the tests of names."""

    name = "ours"
    vocab_size = n_classes = 4
    max_seq_len = 4

    def sample(self, rng, batch_size, step, split):
        raise NotImplementedError


def test_a_task_is_found_as_module_and_class():
    assert find_task("test_tokens:Ours") is Ours
    assert TrainConfig(task=TaskConfig("test_tokens:Ours")).task.name == "test_tokens:Ours"
    assert build_task(TrainConfig(task=TaskConfig("test_tokens:Ours", seed=5))).seed == 5


def test_a_task_is_found_by_its_entry_point(monkeypatch):
    from importlib.metadata import EntryPoint

    entry = EntryPoint("ours", "test_tokens:Ours", "shift.tasks")
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [entry] * (group == "shift.tasks"))
    assert find_task("ours") is Ours
    with pytest.raises(ShiftInputError, match="ours, or module:Class"):
        find_task("their")


@pytest.mark.parametrize("name", ["nowhere:Task", "test_tokens:Nothing", "test_tokens:math", ":x", "a b:c"])
def test_what_is_no_task_is_refused(name):
    with pytest.raises(ShiftInputError, match="'name'"):
        find_task(name)
