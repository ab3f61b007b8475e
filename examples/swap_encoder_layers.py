"""Give a trained nn.TransformerEncoder Smart Bird attention: same weights, fewer keys.

The sketches start untrained and learn here from what the dense attention of the model looks at
(the warm-up target), without touching the model's own weights.

    python examples/swap_encoder_layers.py
"""

from typing import Any

import torch
from torch import Tensor, nn

from smartbird import DenseWarmup, SmartBirdEncoderLayer, sketch_loss

D_MODEL, HEADS, LENGTH, KEYS, STEPS = 64, 4, 256, 32, 60


def sequences(count: int) -> Tensor:
    """Tokens that repeat: each is one of 32 vectors and a little noise, so attention finds it."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = torch.randn(32, D_MODEL, generator=generator)
    noise = torch.randn(count, LENGTH, D_MODEL, generator=generator)
    return vocabulary[torch.randint(32, (count, LENGTH), generator=generator)] + 0.3 * noise


def sharpen(encoder: nn.TransformerEncoder) -> None:
    """Stands in for training: make the attention of random weights prefer similar tokens."""
    with torch.no_grad():
        for layer in encoder.layers:
            assert isinstance(layer, nn.TransformerEncoderLayer)
            q, k, _ = layer.self_attn.in_proj_weight.chunk(3)
            k.copy_(q)
            q.mul_(2)
            k.mul_(2)


def main() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(D_MODEL, HEADS, dropout=0.0, batch_first=True)
    dense = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
    sharpen(dense)

    # nn.TransformerEncoder's annotation names its own layer, but any with its interface serves.
    sparse_layer: Any = SmartBirdEncoderLayer(
        D_MODEL, HEADS, dropout=0.0, batch_first=True, num_samples=KEYS, sketch_dim=16
    )
    sparse = nn.TransformerEncoder(sparse_layer, num_layers=2, enable_nested_tensor=False)
    missing, _ = sparse.load_state_dict(dense.state_dict(), strict=False)
    sketches = [parameter for name, parameter in sparse.named_parameters() if name in missing]

    x = sequences(4)
    expected = dense(x).detach()

    def error() -> float:
        sparse.eval()
        with torch.inference_mode():
            return ((sparse(x) - expected).norm() / expected.norm()).item()

    print(f"{KEYS} of {LENGTH} keys, untrained sketch: relative error {error():.3f}")
    optimizer = torch.optim.Adam(sketches, lr=1e-2)
    warmup = DenseWarmup(sparse, steps=STEPS)
    for _ in range(STEPS):
        sparse.train()
        sparse(x)
        loss = sketch_loss(sparse)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        warmup.step()
    print(f"{KEYS} of {LENGTH} keys, trained sketch:   relative error {error():.3f}")


if __name__ == "__main__":
    main()
