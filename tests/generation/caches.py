"""Key-value caches as people write them by hand: concatenation, `index_copy_`, slice assignment, a ring of a fixed window."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH, HEADS, KEY_HEADS, HEAD_DIM = 32, 4, 2, 8
State = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """Grouped-query attention over a cache that a subclass keeps."""

    def __init__(self, spelled: str = "sdpa") -> None:
        super().__init__()
        self.spelled = spelled
        self.q = nn.Linear(WIDTH, HEADS * HEAD_DIM, bias=False)
        self.kv = nn.Linear(WIDTH, 2 * KEY_HEADS * HEAD_DIM, bias=False)
        self.o = nn.Linear(HEADS * HEAD_DIM, WIDTH, bias=False)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, length = x.shape[:2]
        q = self.q(x).view(batch, length, HEADS, HEAD_DIM).transpose(1, 2)
        k, v = self.kv(x).view(batch, length, 2 * KEY_HEADS, HEAD_DIM).transpose(1, 2).chunk(2, 1)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        """(B,H,M,D), (B,HK,N,D) twice and bool (B or 1,1,M,N) -> (B,M,WIDTH)."""
        k, v = (t.repeat_interleave(HEADS // KEY_HEADS, 1) for t in (k, v))
        if self.spelled == "sdpa":
            out = functional.scaled_dot_product_attention(q, k, v, attn_mask=keep)
        else:
            scores = q @ k.transpose(-1, -2) / HEAD_DIM**0.5
            out = scores.masked_fill(~keep, torch.finfo(scores.dtype).min).softmax(-1) @ v
        return self.o(out.transpose(1, 2).flatten(2))


class Concatenated(Attention):
    """The cache grows: `torch.cat` of old and new."""

    def forward(self, x: Tensor, old: State) -> tuple[Tensor, State]:
        q, k, v = self.heads(x)
        k, v = torch.cat([old[0], k], 2), torch.cat([old[1], v], 2)
        before = old[0].shape[2]
        i = torch.arange(before, before + x.shape[1], device=x.device)
        keep = torch.arange(k.shape[2], device=x.device) <= i[:, None]
        return self.attend(q, k, v, keep[None, None]), (k, v)


class Indexed(Attention):
    """A preallocated cache, written at positions that are a tensor; attention over all of it."""

    def forward(self, x: Tensor, cache: State, position: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        cache[0].index_copy_(2, position, k)
        cache[1].index_copy_(2, position, v)
        keep = torch.arange(cache[0].shape[2], device=x.device) <= position[:, None]
        return self.attend(q, cache[0], cache[1], keep[None, None])


class Assigned(Attention):
    """A preallocated cache, written by a slice; attention over what is filled."""

    def forward(self, x: Tensor, cache: State, start: int) -> Tensor:
        q, k, v = self.heads(x)
        end = start + x.shape[1]
        cache[0][:, :, start:end] = k
        cache[1][:, :, start:end] = v
        keep = torch.arange(end, device=x.device) <= torch.arange(start, end, device=x.device)[:, None]
        return self.attend(q, cache[0][:, :, :end], cache[1][:, :, :end], keep[None, None])


class Windowed(Attention):
    """The cache slides: the last `window` keys stay, as in Mistral."""

    window = 13

    def forward(self, x: Tensor, old: State) -> tuple[Tensor, State]:
        q, k, v = self.heads(x)
        k, v = torch.cat([old[0], k], 2), torch.cat([old[1], v], 2)
        before = old[0].shape[2]
        i = torch.arange(before, before + x.shape[1], device=x.device)[:, None]
        j = torch.arange(k.shape[2], device=x.device)
        keep = (j <= i) & (i - j < self.window)
        return self.attend(q, k, v, keep[None, None]), (k[:, :, 1 - self.window :], v[:, :, 1 - self.window :])


def made(kind: type[Attention], spelled: str) -> Attention:
    torch.manual_seed(0)
    return kind(spelled).eval()


def decode(module: Attention, call: Callable[..., object], prompt: int, steps: int, room: int = 64) -> Tensor:
    """The outputs (B, prompt + steps, WIDTH) of a prefill and `steps` single tokens; `call` is `module` or its compile."""
    x = torch.randn(2, prompt + steps, WIDTH, generator=torch.Generator().manual_seed(1))
    pieces = [x[:, :prompt], *x[:, prompt:].split(1, 1)]
    found, at = [], 0
    length = 0 if isinstance(module, Concatenated | Windowed) else room
    state = torch.zeros(2, KEY_HEADS, length, HEAD_DIM), torch.zeros(2, KEY_HEADS, length, HEAD_DIM)
    with torch.no_grad():
        for piece in pieces:
            end = at + piece.shape[1]
            if isinstance(module, Concatenated | Windowed):
                out, state = call(piece, state)  # type: ignore[misc]
            else:
                out = call(piece, state, torch.arange(at, end) if isinstance(module, Indexed) else at)
            found.append(out)
            at = end
    return torch.cat(found, 1)  # type: ignore[arg-type]
