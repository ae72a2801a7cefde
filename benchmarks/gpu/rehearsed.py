"""What a rehearsal's children have in common, imported once, by the process from which they are forked."""

import importlib

from benchmarks.gpu import rehearsal

rehearsal.install()
for name in ("torch._dynamo", "shift.run.trainer"):  # not before Triton knows that it interprets
    importlib.import_module(name)
