"""torch.export and ONNX, with batch and seq_len left open; by torch's operators alone where asked for."""

import pytest
import torch
from torch import nn
from torch.export import Dim

from shift_kernels import BlockSpec, LoopedBlock

SHAPES = ({0: Dim("batch"), 1: Dim("seq_len")}, {0: Dim("batch")})


class Ragged(nn.Module):
    """A looped block whose call is two tensors."""

    def __init__(self, backend):
        super().__init__()
        torch.manual_seed(0)
        self.block = LoopedBlock(BlockSpec(d_model=8, n_heads=2, d_ff=0, injection="add"))
        self.backend = backend

    def forward(self, e, seq_lens):
        return self.block(e, 2, seq_lens=seq_lens, backend=self.backend)


def inputs(batch, seq_len):
    torch.manual_seed(1)
    return torch.randn(batch, seq_len, 8), torch.randint(seq_len + 1, (batch,))


@pytest.mark.parametrize("backend", ["cpu", "auto"])
def test_an_exported_block_takes_other_batches_and_lengths(backend):
    model = Ragged(backend).eval()
    program = torch.export.export(model, inputs(2, 5), dynamic_shapes=SHAPES)
    for shape in ((4, 9), (3, 2)):
        with torch.no_grad():
            torch.testing.assert_close(program.module()(*inputs(*shape)), model(*inputs(*shape)))


def test_onnx_gets_operators_of_its_own_and_the_same_result():  # by a torch.export of torch's alone
    reference = pytest.importorskip("onnx.reference")
    pytest.importorskip("onnxscript")
    model = Ragged("auto").eval()
    program = torch.onnx.export(
        model, inputs(2, 5), dynamo=True, dynamic_shapes=SHAPES, verbose=False, optimize=False
    )
    proto = program.model_proto
    assert {node.domain for node in proto.graph.node} == {""}
    given = inputs(4, 9)
    names = [entry.name for entry in proto.graph.input]
    (found,) = reference.ReferenceEvaluator(proto).run(
        None, {name: x.numpy() for name, x in zip(names, given, strict=True)}
    )
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), model(*given), atol=1e-5, rtol=1e-5)


def test_a_kernel_is_refused_for_onnx_by_name():
    pytest.importorskip("onnxscript")
    with pytest.raises(torch.onnx.OnnxExporterError, match="A kernel is no operator of ONNX"):
        torch.onnx.export(Ragged("cpu").eval(), inputs(2, 5), dynamo=True, verbose=False)
