"""Train on a task of your own: write one class, enter it under its name, and every command's parts know it.

    python examples/own_task.py

A batch is a function of (seed, split, step, rank) alone, so a run that was stopped goes on with the very
samples that it would have seen.
"""

import tempfile

import numpy as np

from shift import IGNORE, TASKS, ModelConfig, ScheduleConfig, Task, TaskConfig, TrainConfig, Trainer
from shift.tasks.base import Batch, to_batch


class Reverse(Task):
    """A word of random letters, a bar, then the word backwards, which is read letter by letter.

    Args:
        seed: of the data.
        letters: of the alphabet.
        length: of a word.
    """

    name = "reverse"

    def __init__(self, seed: int = 0, letters: int = 4, length: int = 5) -> None:
        super().__init__(seed)
        self.letters = self.check_int("letters", letters, 2)
        self.length = self.check_int("length", length, 1)
        self.n_classes = letters
        self.vocab_size = letters + 1  # and the bar
        self.max_seq_len = 2 * length

    def sample(self, rng: np.random.Generator, batch_size: int, step: int, split: str) -> Batch:
        word = rng.integers(self.letters, size=(batch_size, self.length))
        bar = np.full((batch_size, 1), self.letters)
        answer = word[:, ::-1]
        tokens = np.concatenate([word, bar, answer[:, :-1]], axis=1)
        unread = np.full((batch_size, self.length), IGNORE)
        return to_batch(tokens, np.concatenate([unread, answer], axis=1))


TASKS[Reverse.name] = Reverse

config = TrainConfig(
    task=TaskConfig("reverse", options={"letters": 3, "length": 4}),
    model=ModelConfig(n_loops=2, d_model=32, n_heads=2, d_ff=64),
    schedule=ScheduleConfig("fixed", {"at": 0.25}),
    steps=200,
    eval_every=100,
    eval_samples=64,
    checkpoint_every=0,
)
with tempfile.TemporaryDirectory() as folder:
    result = Trainer(config, folder).fit()
print(f"switch at step {result['switch_step']}; {result['final_eval']['accuracy']:.0%} of the letters right")
