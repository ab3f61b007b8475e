"""A causal language model whose layers bring their own projections: GQA, RoPE and sampled keys.

`smartbird.SampledAttention` draws keys and attends to them; everything around it is the model's:
its projections, rotary embedding and sketches, here one for each key/value head, turned as q and k
are. The text is random tokens, each sequence twice in a row: the second half can be told from the
first by whoever finds where the last token stood before.

    python examples/rotary_gqa_decoder.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smartbird import SampledAttention, sketch_stats
from smartbird.nn import RotaryEmbedding

VOCABULARY, DIM, HEADS, KV_HEADS, SKETCH_DIM = 64, 64, 4, 2, 16
HALF, KEYS, STEPS = 32, 8, 150


class Attention(nn.Module):
    """Grouped-query attention with rotary embedding, over keys that sketches sample."""

    def __init__(self) -> None:
        super().__init__()
        head_dim = DIM // HEADS
        self.widths = {
            "q": (HEADS, head_dim),
            "k": (KV_HEADS, head_dim),
            "v": (KV_HEADS, head_dim),
        }
        self.projections = nn.ModuleDict(
            {name: nn.Linear(DIM, heads * width) for name, (heads, width) in self.widths.items()}
        )
        self.sketches = nn.Linear(DIM, 2 * KV_HEADS * SKETCH_DIM, bias=False)
        self.out = nn.Linear(DIM, DIM)
        self.rotary = RotaryEmbedding()
        # The loss of the sketches rides on the output, so the training loop need not know of it.
        self.attention = SampledAttention(
            HEADS, num_kv_heads=KV_HEADS, num_samples=KEYS, is_causal=True, loss_weight=1.0
        )

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1])
        q, k, v = (
            self.projections[name](x).unflatten(-1, shape).transpose(1, 2).contiguous()
            for name, shape in self.widths.items()
        )
        # Detached: their loss teaches the sketches where to look, not the model to be predictable.
        sketches = self.sketches(x.detach()).unflatten(-1, (2 * KV_HEADS, -1)).transpose(1, 2)
        q, k, q_sketch, k_sketch = (
            self.rotary(part, positions) for part in (q, k, *sketches.chunk(2, dim=1))
        )
        out = self.attention(q, k, v, q_sketch, k_sketch)
        return self.out(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.RMSNorm(DIM), Attention()
        self.norm, self.feed_forward = nn.RMSNorm(DIM), feed_forward()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.norm(x))


class Decoder(nn.Module):
    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, DIM)
        self.layers = nn.Sequential(*(Block() for _ in range(layers)))
        self.head = nn.Sequential(nn.RMSNorm(DIM), nn.Linear(DIM, VOCABULARY))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layers(self.embedding(tokens)))


def feed_forward() -> nn.Module:
    return nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.SiLU(), nn.Linear(2 * DIM, DIM))


def texts(count: int) -> Tensor:
    return torch.randint(VOCABULARY, (count, HALF)).repeat(1, 2)


def main() -> None:
    torch.set_num_threads(1)  # the tensors are too small to share out
    torch.manual_seed(0)
    model = Decoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(STEPS + 1):
        tokens = texts(8)
        logits = model(tokens[:, :-1])[:, HALF - 1 :]
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, HALF:].flatten())
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    model.eval()
    tokens = texts(16)
    with torch.inference_mode(), sketch_stats(model) as stats:
        told = model(tokens[:, :-1]).argmax(-1)[:, HALF - 1 :]
    correct = (told == tokens[:, HALF:]).float().mean().item()
    print(f"{KEYS} of {2 * HALF} keys: {100 * correct:.1f} % of the second half told")
    for name, layer in stats.items():
        print(f"{name}: its keys hold {100 * layer.mass:.0f} % of what dense attention looks at")


if __name__ == "__main__":
    main()
