"""Backends that behave in one way each, on CPU tensors: what calibration has to tell apart.

Importing this module registers them, in whichever process; :func:`forget_them` takes them out again.
"""

import os
import time
from pathlib import Path

from shift_kernels.backends.base import LOOPED_BLOCK, UNVERIFIED
from shift_kernels.backends.torch import TorchBackend


class Fake(TorchBackend):
    """Right, and never taken unless it was verified."""

    def __init__(self, name, act=lambda h: h):
        self.name, self.act = name, act

    def why_not(self, problem):
        return None if problem is None else UNVERIFIED

    def forward(self, *arguments, **options):
        h, used, saved = super().forward(*arguments, **options)
        return self.act(h), used, saved


def slowly(h):
    time.sleep(0.05)
    return h


def a_little_off(h):
    return h * 1.001


def crash(h):
    os.abort()


def hang(h):
    if "FAKE_HANGS_IN" in os.environ:  # a file to say in that it does, and which process
        Path(os.environ["FAKE_HANGS_IN"]).write_text(str(os.getpid()))
    time.sleep(3600)


FAKES = [
    Fake("fake_fast"),
    Fake("fake_slow", slowly),
    Fake("fake_wrong", a_little_off),
    Fake("fake_crashing", crash),
    Fake("fake_hanging", hang),
]
for fake in FAKES:
    LOOPED_BLOCK.register(fake)


def forget_them():
    for fake in FAKES:
        LOOPED_BLOCK.remove(fake.name)
