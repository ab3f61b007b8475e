"""The operators: checked, differentiable, traceable calls of the compiled kernels.

Letters: B batch, N queries, M keys, H heads, H_kv key/value heads, H_i index heads (head h uses
index head ``h // (H / H_i)``), H_s sketches (index head h draws by sketch ``h // (H_i / H_s)``),
H_ks sketches of keys, D head dim, Dv value dim, S sketch dim, K samples per query and index head, n
packed sequences. Tensors may be strided views, not copied where the last dimension is contiguous;
k and v (for the backward also q) whose heads are contiguous are gathered faster than interleaved
ones. float32, float64, bfloat16 and float16, one dtype per call; accumulation is in float32
(float64 for float64), sampling in float32 always. Under autocast, float inputs are cast to its
dtype as in scaled_dot_product_attention.

Each call is a pure function of its arguments: random draws are those of ``seed``, an int64 tensor
[2] (seed, offset), drawn from ``generator`` where None, and do not depend on the number of threads.
Each row is a function of what it sees and of who it is, its sequence id, head and position: not of
the place in the call nor of other rows. A GPU draws other keys by a seed than a CPU ("gumbel",
"multinomial").

Of PyTorch's transforms: ``torch.vmap`` works (with ``randomness="different"``, or a given seed), as
do torch.compile and torch.export. Gradients have no gradients of their own: asking for them is a
RuntimeError. Forward-mode AD is a NotImplementedError. ``torch.func.grad``, ``vjp`` and ``jacrev``
are PyTorch's RuntimeError about ``setup_context``, as of every custom op with a formula of its own:
take ``torch.autograd.grad``. ``torch.utils.flop_counter`` counts all of the ops.

The underlying dispatcher ops are ``torch.ops.smartbird.*``.
"""

from smartbird._checks import draw_seed
from smartbird.ops.dense import sketch_lse
from smartbird.ops.distill import distill_loss
from smartbird.ops.gather import gather_attention, gather_scores
from smartbird.ops.sample import sketch_sample

__all__ = [
    "distill_loss",
    "draw_seed",
    "gather_attention",
    "gather_scores",
    "sketch_lse",
    "sketch_sample",
]
