"""Makes Triton's interpreter right in bf16, which it stores as uint16 bit patterns.

Without this, arithmetic and matmuls on bf16 work on the bit patterns and casts truncate. Reductions are not
patched: kernels reduce in fp32 anyway. Also watches every load and store: an address outside the tensors of
its launch is an error, as a guard band around every buffer would show it for stores alone. So is an integer
that overflows.

Import this before any kernel: whether Triton interprets or compiles is decided where a kernel is defined.
With a GPU the tests run compiled, on it.
"""

import functools
import operator
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

import triton.language as tl  # noqa: E402
from triton.language import core  # noqa: E402
from triton.language.semantic import TritonSemantic  # noqa: E402
from triton.runtime import interpreter  # noqa: E402
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle  # noqa: E402


def to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bits(x: np.ndarray) -> np.ndarray:
    """Round fp32 to bf16, nearest and ties to even, as hardware does."""
    u = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = ((u + (0x7FFF + ((u >> 16) & 1)).astype(np.uint32)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def is_bf16(dtype) -> bool:
    return dtype.scalar == tl.bfloat16


def widened(x: TensorHandle) -> TensorHandle:
    return TensorHandle(to_float32(x.data), tl.float32) if is_bf16(x.dtype) else x


def install() -> None:
    dot, cast, binary = (
        InterpreterBuilder.create_dot,
        InterpreterBuilder.cast_impl,
        InterpreterBuilder.binary_op,
    )
    fp_to_fp = InterpreterBuilder.create_fp_to_fp

    def cast_impl(self, x, to):
        if is_bf16(x.dtype) and is_bf16(to):
            return x
        if is_bf16(to):
            return TensorHandle(to_bits(x.data.astype(np.float32)), tl.bfloat16)
        if is_bf16(x.dtype):
            x = widened(x)
            return x if to.scalar == tl.float32 else cast(self, x, to)
        return cast(self, x, to)

    def binary_op(self, a, b, op):
        if not is_bf16(a.dtype):
            return binary(self, a, b, op)
        y = binary(self, widened(a), widened(b), op)
        return y if y.data.dtype == np.bool_ else TensorHandle(to_bits(y.data), tl.bfloat16)

    def create_fp_to_fp(self, x, to, rounding):
        narrow = min(x.dtype.scalar.primitive_bitwidth, to.scalar.primitive_bitwidth) < 16
        if narrow or not (is_bf16(x.dtype) or is_bf16(to)):
            return fp_to_fp(self, x, to, rounding)
        return cast_impl(self, x, to)

    InterpreterBuilder.create_dot = lambda self, a, b, acc, *rest: dot(
        self, widened(a), widened(b), acc, *rest
    )
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.binary_op = binary_op
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp
    for name in ("fp_trunc", "fp_ext", "si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui"):
        setattr(InterpreterBuilder, f"create_{name}", lambda self, x, to: self.cast_impl(x, to))


def watch_addresses() -> None:
    """Loads and stores must stay within the tensors that their launch was given."""
    prepare = GridExecutor._init_args_hst
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    extents = np.zeros((0, 2), np.uint64)  # first byte and one past the last, sorted

    def _init_args_hst(self, args_dev, kwargs):
        nonlocal extents
        args, kwargs = prepare(self, args_dev, kwargs)
        found = sorted({extent(x) for x in tensors_in((*args, *kwargs.values()))})
        extents = np.array(found, np.uint64).reshape(-1, 2)
        return args, kwargs

    def tensors_in(args):
        for x in args:
            if isinstance(x, torch.Tensor):
                yield x
            elif isinstance(x, tuple):
                yield from tensors_in(x)

    def extent(x: torch.Tensor) -> tuple[int, int]:
        span = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) + 1
        return x.data_ptr(), x.data_ptr() + (span if x.numel() else 0) * x.itemsize

    def check(ptrs: TensorHandle, mask: TensorHandle, kind: str) -> None:
        at = ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape)].astype(np.uint64)
        if not len(at):
            return
        inside = np.zeros(at.shape, bool)
        for first, end in extents:
            inside |= (at >= first) & (at < end)
        if not inside.all():
            raise IndexError(f"{kind} outside every tensor of the launch at {int(at[~inside][0]):#x}")

    def create_masked_load(self, ptrs, mask, *rest):
        check(ptrs, mask, "load")
        return load(self, ptrs, mask, *rest)

    def create_masked_store(self, ptrs, value, mask, *rest):
        check(ptrs, mask, "store")
        return store(self, ptrs, value, mask, *rest)

    GridExecutor._init_args_hst = _init_args_hst
    InterpreterBuilder.create_masked_load = create_masked_load
    InterpreterBuilder.create_masked_store = create_masked_store


def patch_once_a_launch() -> None:
    """The interpreter patches triton.language at each call of a device function: a quarter of all time."""
    call, patch = GridExecutor.__call__, interpreter._patch_lang
    patched: set[int] = set()

    def __call__(self, *args, **kwargs):
        patched.clear()  # what a launch has patched it takes back at its end
        return call(self, *args, **kwargs)

    def _patch_lang(fn):
        module = id(fn.__globals__)
        if module in patched:
            return None
        patched.add(module)
        return patch(fn)

    GridExecutor.__call__ = __call__
    interpreter._patch_lang = _patch_lang


def check_overflow_at_once() -> None:
    """The interpreter checks integers for overflow in ten operations and drops the result.

    The checks took two fifths of all time. Here one operation checks, and an overflow raises.
    """

    def binary_op_sanitize_overflow_impl(self, a, b, op):
        kind = a.type.scalar
        if kind.int_bitwidth >= 64 or not self.builder.options.sanitize_overflow:
            return
        y = getattr(operator, op.__name__)(*(x.handle.data.astype(np.int64) for x in (a, b)))
        if y.size and not kind.get_int_min_value() <= y.min() <= y.max() <= kind.get_int_max_value():
            raise OverflowError(f"{kind} overflows in {op.__name__}")

    TritonSemantic.binary_op_sanitize_overflow_impl = binary_op_sanitize_overflow_impl


def name_types_when_asked() -> None:
    """Derive the type of a tuple when it is read. The interpreter derives all; most are never read."""

    def __init__(self, args, type=None):
        self.values = list(args)
        if type is not None:
            self.type = type if isinstance(type, tl.tuple_type) else tl.tuple_type(type)

    tl.tuple.__init__ = __init__
    tl.tuple.type = functools.cached_property(lambda self: core._type_for_tuple_values(self.values))
    tl.tuple.type.__set_name__(tl.tuple, "type")


def make_types_once() -> None:
    """Look up types of blocks, and what numpy calls a type: the interpreter makes them at each operation."""
    create, in_numpy = tl.block_type.__init__, interpreter._get_np_dtype
    blocks: dict[tuple, dict] = {}
    numpys: dict[str, np.dtype] = {}

    def __init__(self, element_ty, shape):
        key = (str(element_ty), *shape)
        if key not in blocks:
            create(self, element_ty, shape)
            blocks[key] = dict(vars(self))
        vars(self).update(blocks[key])

    def _get_np_dtype(kind):
        name = str(kind.scalar)
        if name not in numpys:
            numpys[name] = in_numpy(kind)
        return numpys[name]

    tl.block_type.__init__ = __init__
    interpreter._get_np_dtype = _get_np_dtype


def run_on_a_stack_of_its_own() -> None:
    """Python maps and unmaps memory at each call that crosses the end of a 16 KiB chunk of its stack.

    A launch deep in pytest and hypothesis crosses it at every operation, which took over half of all time; in
    a new thread it does not get so deep.
    """
    call = GridExecutor.__call__

    def __call__(self, *args, **kwargs):
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(call, self, *args, **kwargs).result()

    GridExecutor.__call__ = __call__


if DEVICE == "cpu":
    install()
    watch_addresses()
    patch_once_a_launch()
    check_overflow_at_once()
    name_types_when_asked()
    make_types_once()
    run_on_a_stack_of_its_own()
