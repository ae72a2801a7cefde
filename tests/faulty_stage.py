"""A stage of benchmarks/gpu whose cases end as they are asked to: what isolation has to cope with."""

import os
import signal
import sys
import time
from pathlib import Path

from benchmarks.gpu.work import OK, WRONG, Finding


def run(case):
    do = case.arguments["do"]
    print("a stray line")
    if do == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif do == "hang":
        time.sleep(60)
    elif do == "raise":
        raise ValueError("not today\nor tomorrow")
    elif do == "leave":
        sys.exit(3)
    elif do == "meet":
        meet(Path(case.arguments["folder"]), case.name)
    return Finding(WRONG if do == "wrong" else OK, "", {"process": os.getpid()})


def meet(folder, name):
    """Wait until another case is here, too."""
    (folder / f"met-{name}").touch()
    while len(list(folder.glob("met-*"))) < 2:
        time.sleep(0.02)
