"""What the GPU backends ask torch before a launch."""

import pytest
import torch

from shift_kernels.backends.device import matmul_precision


@pytest.mark.parametrize(("switch", "expected"), [("highest", "ieee"), ("high", "tf32")])
def test_float32_products_follow_the_older_switch(switch, expected):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(switch)
        assert matmul_precision() == expected
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(("switch", "expected"), [("ieee", "ieee"), ("tf32", "tf32")])
def test_float32_products_follow_the_newer_switch_after_which_the_older_cannot_be_read(switch, expected):
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = switch
        assert matmul_precision() == expected
    finally:
        matmul.fp32_precision = before
