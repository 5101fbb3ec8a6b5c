# seed 7, program 635: gradient of table: 0 NaN instead of 1, of 6
# Program(sizes=Sizes(batch=2, windows=0, heads=1, group=1, queries=2, keys=3, width=2, value_width=2), dtype='float32', storage=Storage(query='b h i d', key='b h j d', value='b h j e', packed='no'), scores=Scores(how='matmul', lead='b h', keys_first=False, scale=Scale(where='none', how='mul', value=0.5), softcap=0.0, product='own', repeat='expand'), terms=(Mask(kind='causal', how='masked_fill', fill='-inf', letters='i j', empty=False), Bias(kind='t5', letters='i j', learned=True)), softmax=Softmax(how='method', upcast='none', dropout=False), output=Output(how='matmul', lead='b h', tail='b h i e', linear=False, extra=()), inplace=False, shapes=False, mutation='additive mask cast to bool', style=0, seed=0)
import math

import torch
import torch.nn.functional as F


def program(q, k, v, table, additive):
    k_t = k.transpose(2, 3)
    s = q @ k_t
    i = torch.arange(2)[:, None]
    j = torch.arange(3)[None, :]
    keep = j <= i
    drop = ~keep
    s2 = s.masked_fill(drop, float("-inf"))
    i2 = torch.arange(2)[:, None]
    j2 = torch.arange(3)[None, :]
    n = (i2 - j2).clamp(min=0)
    far = 2 + (torch.log(n.float() / 2) / math.log(8 / 2) * 4).to(torch.long)
    far2 = far.clamp(max=5)
    bucket = torch.where(n < 2, n, far2)
    bias = F.embedding(bucket, table)
    bias2 = bias.permute(2, 0, 1)
    s3 = s2 + bias2
    additive2 = additive[:, None, None, :]
    s3 = s3.masked_fill(~additive2.to(torch.bool), float("-inf"))
    p = s3.softmax(-1)
    o = p @ v
    return o


dtype = torch.float32
torch.manual_seed(0)
inputs = {
    "q": torch.randn(2, 1, 2, 2).to(dtype).requires_grad_(),
    "k": torch.randn(2, 1, 3, 2).to(dtype).requires_grad_(),
    "v": torch.randn(2, 1, 3, 2).to(dtype).requires_grad_(),
    "table": torch.randn(6, 1).to(dtype).requires_grad_(),
    "additive": torch.zeros(2, 3).masked_fill(torch.rand(2, 3) > 0.5, -1e9),
}


import attnfx

compiled = attnfx.compile(program, inner="eager", strict=True)
print(attnfx.explain(program, **inputs))
for ours, eager in zip(*(out if isinstance(out, tuple) else (out,) for out in (compiled(**inputs), program(**inputs)))):
    print((ours.double() - eager.double()).abs().max().item(), "apart; NaN:", int(ours.isnan().sum()), int(eager.isnan().sum()))
