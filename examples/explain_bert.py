"""See what was found in a model, without running it compiled: one line an attention, with its formula and the reason.

python examples/explain_bert.py
"""

import torch
from transformers import BertConfig, BertModel

import attnfx

torch.manual_seed(0)
model = BertModel(BertConfig(hidden_size=96, num_hidden_layers=3, num_attention_heads=4, intermediate_size=192)).eval()
tokens = torch.randint(0, model.config.vocab_size, (2, 77))
mask = torch.ones_like(tokens)
mask[1, 50:] = 0  # the second text is shorter: its padding is masked

with torch.no_grad():
    report = attnfx.explain(model, tokens, attention_mask=mask)

print(report)
for site in report.sites:
    print(f"{site.module}: {site.site}\n    {site.decision}, because {site.reason}")
assert len(report.sites) == 3
