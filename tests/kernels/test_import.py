"""Importing the kernels is cheap and does nothing but import."""

import json
import subprocess
import sys

CHILD = """
import json, sys, threading, time
OTHERS = {{"matplotlib", "tyro", "tqdm", "shift", "safetensors", "triton"}}
spawned = []
sys.addaudithook(lambda event, args: spawned.append(event) if event in
    ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork") else None)
{before}
import torch
modules = set(sys.modules)
threads = threading.active_count()
spawned.clear()
start = time.process_time()
import shift_kernels
print(json.dumps(dict(
    seconds=time.process_time() - start,
    spawned=spawned,
    threads=threading.active_count() - threads,
    others=sorted({{m.split(".")[0] for m in set(sys.modules) - modules}} & OTHERS),
    backends=shift_kernels.backends(),
)))
"""


def run(before=""):
    code = CHILD.format(before=before)
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(child.stdout)


def test_import_starts_nothing_and_adds_little_to_torchs_own_time():
    # Processor time, the best of three: the limit is about what the import does, not about a busy machine.
    runs = [run() for _ in range(3)]
    assert runs[0]["spawned"] == []
    assert runs[0]["threads"] == 0
    assert runs[0]["others"] == []
    assert min(r["seconds"] for r in runs) < 0.2


def test_import_works_where_there_is_no_triton():
    result = run(before='sys.modules["triton"] = None')
    assert result["backends"]["torch"] == "available"
