"""How the registered operator is called, for the tests of its backends."""


def ops_arguments(
    e,
    block,
    n_loops=2,
    sample_loops=None,
    seq_lens=None,
    all_loops=False,
    n_grad_loops=None,
    halt=None,
    compute_dtype=None,
    backend="torch",
):
    """Arguments of torch.ops.shift_kernels.looped_block, by name and with defaults."""
    weights = [block.weights()[name] for name in block.spec.weight_shapes()]
    save = halt is None
    return (
        e, weights, block.spec.key, n_loops, sample_loops, seq_lens, all_loops, n_grad_loops, halt,
        compute_dtype, save, backend,
    )  # fmt: skip
