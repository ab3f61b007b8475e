"""Save pictures of the keys that a layer samples (needs the extra smartbird[plot]).

python examples/plot_draws.py [DIRECTORY]
"""

import sys
from pathlib import Path

import torch

from smartbird import SmartBirdAttention
from smartbird.inspection import record
from smartbird.plot import plot_arcs, plot_heat_map

TEXT = "the cat saw the dog and the dog saw the cat but the bird saw them both"


def main(directory: Path) -> None:
    torch.manual_seed(0)
    words = TEXT.split()
    vectors = {word: torch.randn(32) for word in words}
    x = torch.stack([vectors[word] for word in words])

    layer = SmartBirdAttention(32, 4, num_samples=4, sketch_dim=32).eval()
    with torch.no_grad():  # a sketch that looks for the same word: q_sketch = k_sketch
        q_weight, k_weight = layer.sketch_proj_weight.chunk(2)
        k_weight.copy_(q_weight)
    with record(layer) as calls:
        layer(x)

    call = calls["core"]  # by the name in the model of what draws keys
    drawn = call.indices  # [1, 4, N, 4]; None where a layer attends to all keys
    assert drawn is not None
    plot_arcs(drawn, words).savefig(directory / "arcs.png")
    panels = {f"head {h}": drawn[:, h] for h in range(4)}
    plot_heat_map(panels, len(words), tokens=words).savefig(directory / "heat_map.png")
    print(f"{call.recall().mean():.0%} of dense attention is on the keys drawn")
    print(f"wrote {directory / 'arcs.png'} and {directory / 'heat_map.png'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
