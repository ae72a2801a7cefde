"""``shift-calibrate``: verify and time every backend on this device for your shapes; ``auto`` goes by it.

    shift-calibrate --config demo                                       # the shapes of a training config
    shift-calibrate --spec '{"d_model": 64, "n_heads": 4}' --batch 64 --seq-len 32 --n-loops 1 8 \\
        --dtype bfloat16 --device cuda

Candidates run in processes of their own: one that crashes, hangs or is wrong is marked and never taken. The
table lies in ``$SHIFT_KERNELS_CACHE`` (default ``~/.cache/shift_kernels``). Exit codes: 0 done; 2 unusable
input.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from shift.config import load_config
from shift.run.shapes import problems_of
from shift_kernels import BlockSpec
from shift_kernels.calibrate import LIMIT_S, calibrate
from shift_kernels.call import Problem
from shift_kernels.checks import check_int, check_usable_device
from shift_kernels.console import command
from shift_kernels.errors import input_error
from shift_kernels.spec import MAX_TOKENS

DTYPES = ("float32", "float16", "bfloat16", "float64")


@command("shift-calibrate")
def main(argv: Sequence[str] | None = None) -> int:
    """Flags -> :func:`shift_kernels.calibrate.calibrate` -> exit code."""
    flags = _parser().parse_args(argv)
    problems = problems_of(load_config(flags.config)) if flags.config else _problems(flags)
    calibrate(problems, limit_s=flags.limit)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="shift-calibrate", description=__doc__.split("\n\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", help="a preset or TOML file of shift-train: its shapes")
    what.add_argument("--spec", help="a block: fields of BlockSpec as JSON, or a file that holds them")
    parser.add_argument("--batch", type=int, default=32, help="samples")
    parser.add_argument("--seq-len", type=int, default=64, help="tokens of a sample")
    parser.add_argument("--n-loops", type=int, nargs="+", default=[1, 8], help="numbers of loops T")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype of e and the weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--forward-only", action="store_true", help="inference, without gradients")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds a backend may take for a shape")
    return parser


def _problems(flags: argparse.Namespace) -> list[Problem]:
    me = "shift-calibrate"
    try:
        text = flags.spec if flags.spec.lstrip().startswith("{") else Path(flags.spec).read_text("utf-8-sig")
        fields = json.loads(text)
    except (OSError, ValueError) as error:
        allowed = "fields of BlockSpec as JSON, or a file that holds them"
        raise input_error(me, "--spec", flags.spec, allowed, f"Mend it: {error}.") from error
    check_usable_device(me, "--device", flags.device)
    sizes = {"--batch": flags.batch, "--seq-len": flags.seq_len}
    for name, size in [*sizes.items(), *(("--n-loops", n) for n in flags.n_loops)]:
        check_int(me, name, size, 1, MAX_TOKENS)
    spec, dtype, grad = BlockSpec.from_dict(fields), getattr(torch, flags.dtype), not flags.forward_only
    device = torch.device(flags.device)
    return [
        Problem(spec, flags.batch, flags.seq_len, dtype, dtype, device, grad, n_loops=n)
        for n in flags.n_loops
    ]


if __name__ == "__main__":
    sys.exit(main())
