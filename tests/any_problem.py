"""Small looped blocks of every kind, with every kind of call: what a backend has to serve."""

import torch
from hypothesis import strategies as st

from shift_kernels.backends.base import SERVED_BY_ALL


@st.composite
def problems(draw, norm=None, max_batch=6, max_seq_len=20, served=SERVED_BY_ALL):
    """Options of the block and of a call, batch, seq_len and a seed.

    Args:
        served: as of :class:`shift_kernels.backends.base.Served`: which values are drawn.
    """
    batch, seq_len = draw(st.integers(1, max_batch)), draw(st.integers(1, max_seq_len))
    n_kv_heads = draw(st.integers(1, 3))
    norm = norm or draw(st.sampled_from(["layernorm", "rmsnorm", "none"]))
    options = {
        "d_model": draw(st.integers(6, 40)),  # norms of fewer numbers only magnify rounding
        "n_kv_heads": n_kv_heads,
        "n_heads": n_kv_heads * draw(st.integers(1, 2)),
        "head_dim": 2 * draw(st.integers(2, 10)),
        "d_ff": draw(st.sampled_from([0, 7, 16, 33])),
        "activation": draw(st.sampled_from(served["activation"])),
        "norm": norm,
        "norm_placement": "pre" if norm == "none" else draw(st.sampled_from(served["norm_placement"])),
        "bias": draw(st.booleans()),
        "causal": draw(st.booleans()),
        "position": draw(st.sampled_from(["none", "rope"])),
        "injection": draw(st.sampled_from(served["injection"])),
        "loop_norm": norm != "none" and draw(st.booleans()),
        "n_layers": draw(st.integers(1, 2)),
    }
    if norm != "none":
        options["norm_weight"] = draw(st.sampled_from(served.get("norm_weight", ["scale"])))
    if "qkv_bias" in served:
        options["qkv_bias"] = draw(st.sampled_from([None, True, False]))
        options["residual_scale"] = draw(st.sampled_from([1.0, 0.5, "1/T"]))
        options["window"] = draw(st.sampled_from([None, 1, 3, 16]))
        options["softcap"] = draw(st.sampled_from([None, 1.0, 30.0]))
        options["attn_scale"] = draw(st.sampled_from([None, 0.2]))
        # A query that sees one key has a gradient of 0, and narrow norms magnify what rounding leaves.
        can_norm = norm != "none" and seq_len > 2 and options["window"] != 1 and options["head_dim"] >= 8
        options["qk_norm"] = can_norm and draw(st.booleans())
        if options["position"] == "rope":
            pairs = draw(st.integers(1, options["head_dim"] // 2))
            options["rope_freqs"] = draw(st.sampled_from([None, tuple(0.5**i for i in range(pairs))]))
    per_sample = lambda low, high: torch.tensor([draw(st.integers(low, high)) for _ in range(batch)])  # noqa: E731
    call = {
        "n_loops": draw(st.integers(1, 3)) if draw(st.booleans()) else per_sample(0, 3),
        "return_all_loops": draw(st.booleans()),
        "n_grad_loops": draw(st.sampled_from([None, 1, 2])),
        "seq_lens": per_sample(0, seq_len) if draw(st.booleans()) else None,
    }
    return options, call, batch, seq_len, draw(st.integers(0, 99))
