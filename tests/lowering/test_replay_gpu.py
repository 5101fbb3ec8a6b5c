"""Calls made again on a GPU: other tensors of the same shapes, forward and backward, and in CUDA graphs."""

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def _model(q, k, v, slopes):
    at = torch.arange(q.shape[2], device=q.device)
    away = at[:, None] - at[None, :]
    scores = (q @ k.transpose(2, 3)).float() * q.shape[-1] ** -0.5 - slopes[:, None, None] * away
    keep = (away >= 0) & (away < 200)
    return scores.masked_fill(~keep, float("-inf")).softmax(-1).to(q.dtype) @ v


@pytest.mark.parametrize("shape", [(2, 4, 777, 64), (1, 8, 1024, 128), (3, 4, 49, 32)])
def test_other_tensors_of_the_same_shapes(shape):
    from attnfx.lowering import replay

    torch._dynamo.reset()
    replay.forget()
    compiled = torch.compile(_model, backend="attnfx", dynamic=False)
    slopes = 2.0 ** -torch.arange(1, shape[1] + 1, device="cuda").float()
    for call in range(5):
        torch.manual_seed(call)
        q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        push = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        out = compiled(q, k, v, slopes)
        grads = torch.autograd.grad(out, (q, k, v), push)
        out, *grads = (t.detach() for t in (out, *grads))
        wide = [t.detach().float().requires_grad_() for t in (q, k, v)]
        right = _model(*wide, slopes)
        for mine, theirs in zip((out, *grads), (right, *torch.autograd.grad(right, wide, push.float())), strict=True):
            assert float((mine.float() - theirs).norm() / theirs.norm()) < 1e-2
    assert len(replay._proved) == 2


def test_inside_of_a_cuda_graph():
    torch._dynamo.reset()
    compiled = torch.compile(_model, backend="attnfx", dynamic=False)
    slopes = 2.0 ** -torch.arange(1, 5, device="cuda").float()
    q, k, v = (torch.randn(2, 4, 600, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    with torch.no_grad():
        for _ in range(4):
            compiled(q, k, v, slopes)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = compiled(q, k, v, slopes)
        for t in (q, k, v):
            t.normal_()
        graph.replay()
        right = _model(q.float(), k.float(), v.float(), slopes)
    assert float((out.float() - right).norm() / right.norm()) < 1e-2
