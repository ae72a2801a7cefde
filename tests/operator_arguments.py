"""How the registered operator is called, for the tests of its backends."""


def ops_arguments(e, block, n_loops=2, sample_loops=None, **call):
    """Arguments of torch.ops.shift_kernels.looped_block, by name and with defaults."""
    defaults = {
        "seq_lens": None,
        "h0": None,
        "residual_scale": None,
        "position_offset": None,
        "all_loops": False,
        "n_grad_loops": None,
        "halt": None,
        "compute_dtype": None,
        "save": call.get("halt") is None,
        "backend": "torch",
    }
    assert call.keys() <= defaults.keys(), call
    weights = [block.weights()[name] for name in block.spec.weight_shapes()]
    return (e, weights, block.spec.key, n_loops, sample_loops, *(defaults | call).values())
