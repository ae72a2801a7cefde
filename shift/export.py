"""``shift-export RUN --out DIR``: a trained model as a folder that Hugging Face Transformers loads.

    shift-export runs/lm --out exported

    import shift.pretrained
    model = AutoModelForCausalLM.from_pretrained("exported")
    tokenizer = AutoTokenizer.from_pretrained("exported")  # where the data had one

The folder holds config.json, model.safetensors and the tokenizer, and no code. Exit codes: 0 done; 1
failed (a full disk); 2 unusable input.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro
from safetensors import SafetensorError

from shift.build import build_task
from shift.run.files import make_directory
from shift.tasks.tokens import Tokens
from shift.tokens.tokenizer import END_OF_TEXT, ByteTokenizer, Tokenizer, load_tokenizer
from shift.trained import newest, restored, trained_loops
from shift_kernels import console
from shift_kernels.errors import input_error
from shift_kernels.extras import require

if TYPE_CHECKING:
    import tokenizers


@dataclass(frozen=True)
class Command:
    """A trained model as a folder that Hugging Face Transformers loads."""

    run: tyro.conf.Positional[Path]
    """Run directory."""
    out: Path
    """The folder; must be new or empty."""
    data: Path | None = None
    """Where the tokens lie that the run was trained on, if they were moved."""


@console.command("shift-export")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    command = tyro.cli(Command, args=argv, prog="shift-export")
    require("hf", "shift-export")
    from shift.pretrained import pretrained  # imports transformers, which takes seconds

    run, saved = newest("shift-export", command.run, command.data)
    if command.out.exists() and not (command.out.is_dir() and not any(command.out.iterdir())):
        raise input_error("shift-export", "out", str(command.out), "a new or empty folder", "Choose another.")
    task = build_task(run)
    model = pretrained(restored("shift-export", run, saved, task), trained_loops(saved))
    tokenizer = load_tokenizer(task.folder.path) if isinstance(task, Tokens) else None
    if tokenizer is not None:
        for config in (model.config, model.generation_config):
            config.bos_token_id = config.eos_token_id = tokenizer.separator
    make_directory(command.out, "shift-export", "out")
    with tempfile.TemporaryDirectory(prefix=".export-", dir=command.out.absolute().parent) as folder:
        new = Path(folder) / command.out.name
        try:
            model.cpu().save_pretrained(new)
            if tokenizer is not None:
                _save_tokenizer(tokenizer, new)
        except SafetensorError as error:  # that is how it says that the disk is full
            raise OSError(f"{command.out}: {error}") from error
        os.replace(new, command.out)
    print(f"{command.out}: step {saved.state['step']}, {trained_loops(saved)} loops")
    return 0


def _save_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """Write the files that ``AutoTokenizer`` reads; texts begin with the separator only where one adds it."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    if isinstance(tokenizer, ByteTokenizer):
        theirs = _of_bytes(tokenizer)
    else:
        theirs = tokenizers.Tokenizer.from_buffer(tokenizer.to_bytes())
    separator = theirs.id_to_token(tokenizer.separator)
    PreTrainedTokenizerFast(
        tokenizer_object=theirs, bos_token=separator, eos_token=separator, clean_up_tokenization_spaces=False
    ).save_pretrained(out)


def _of_bytes(tokenizer: ByteTokenizer) -> tokenizers.Tokenizer:
    """The same ids from the package ``tokenizers``: a byte-level BPE that merges nothing."""
    import tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(letters, []))
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    theirs.decoder = tokenizers.decoders.ByteLevel()
    theirs.add_special_tokens([END_OF_TEXT])
    assert theirs.token_to_id(END_OF_TEXT) == tokenizer.separator
    return theirs


if __name__ == "__main__":
    sys.exit(main(None))
