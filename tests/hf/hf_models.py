"""Small random models of each class, and what tests do with them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

T: Any = pytest.importorskip("transformers", reason="the extra `hf` is not installed")

from smartbird import hf  # noqa: E402

VOCABULARY, LENGTH = 97, 40
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.5,  # so that attention and the next token depend on the tokens
}
GQA = SMALL | {"num_key_value_heads": 2}
MODERNBERT = SMALL | {
    **{f"{name}_token_id": place for place, name in enumerate(("pad", "cls", "sep", "bos", "eos"))},
    "local_attention": 8,
    "global_attn_every_n_layers": 2,
}
# Few keys of many, so that a test sees a draw that differs.
FEW: dict[str, Any] = {
    "num_samples": 8,
    "window": 2,
    "num_sinks": 1,
    "sketch_dim": 4,
    "min_length": 0,
}
ALL_KEYS = FEW | {"num_samples": 64}
# transformers renamed it.
CACHE = (
    "cache"
    if "cache" in inspect.signature(T.LlamaForCausalLM.forward).parameters
    else "past_key_values"
)


def gpt2_config(**options: Any) -> Any:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
    return T.GPT2Config(vocab_size=VOCABULARY, initializer_range=0.5, **sizes, **options)


DECODERS: dict[str, Callable[[], Any]] = {
    "llama": lambda: T.LlamaForCausalLM(T.LlamaConfig(**GQA)),
    "mistral": lambda: T.MistralForCausalLM(T.MistralConfig(**GQA, sliding_window=None)),
    "qwen2": lambda: T.Qwen2ForCausalLM(T.Qwen2Config(**GQA)),
    "qwen2_mixed": lambda: T.Qwen2ForCausalLM(
        T.Qwen2Config(**GQA, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    ),
    "qwen3": lambda: T.Qwen3ForCausalLM(T.Qwen3Config(**GQA, head_dim=16)),
    "gemma2": lambda: T.Gemma2ForCausalLM(  # scales by other than the width of a head
        T.Gemma2Config(
            **GQA,
            head_dim=8,
            sliding_window=8,
            query_pre_attn_scalar=3,
            attn_logit_softcapping=None,
        )
    ),
    "granite": lambda: T.GraniteForCausalLM(T.GraniteConfig(**GQA, attention_multiplier=0.7)),
    "gpt2": lambda: T.GPT2LMHeadModel(gpt2_config(scale_attn_by_inverse_layer_idx=True)),
    "neox": lambda: T.GPTNeoXForCausalLM(T.GPTNeoXConfig(**SMALL)),
    "bert_decoder": lambda: T.BertLMHeadModel(T.BertConfig(**SMALL, is_decoder=True)),
}
ENCODERS: dict[str, Callable[[], Any]] = {
    "bert": lambda: T.BertModel(T.BertConfig(**SMALL)),
    "roberta": lambda: T.RobertaModel(T.RobertaConfig(**SMALL)),
    "modernbert": lambda: T.ModernBertModel(T.ModernBertConfig(**MODERNBERT)),
    "bidirectional_llama": lambda: T.LlamaModel(T.LlamaConfig(**GQA, is_causal=False)),
}
# Without a module that can be converted, and a word of the reason.
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "sliding": (
        lambda: T.MistralForCausalLM(T.MistralConfig(**GQA, sliding_window=8)),
        "sliding_window",
    ),
    "softcap": (
        lambda: T.Gemma2ForCausalLM._from_config(
            T.Gemma2Config(**GQA, head_dim=8, sliding_window=8), attn_implementation="eager"
        ),
        "softcap",
    ),
    "attention_sinks": (
        lambda: T.GptOssForCausalLM(
            T.GptOssConfig(**GQA, head_dim=8, num_local_experts=2, num_experts_per_tok=1)
        ),
        "s_aux",
    ),
    "relative_bias": (
        lambda: T.T5Model(
            T.T5Config(
                vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4
            )
        ),
        "interface|position_bias",
    ),
    "no_interface": (
        lambda: T.BloomModel(
            T.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=4)
        ),
        "BloomModel does not go through transformers' attention interface",
    ),
}
FAMILIES = DECODERS | ENCODERS
MAKERS = FAMILIES | {name: make for name, (make, _) in REFUSED.items()}


# In these the first releases of transformers 5 are behind.
NEEDS = {
    "modernbert": ("ModernBertModel", "ALL_ATTENTION_FUNCTIONS"),
    "bidirectional_llama": ("masking_utils", '"is_causal"'),
}


def made(name: str) -> Any:
    """The same model at each call, in evaluation mode."""
    if name in NEEDS:
        where, what = NEEDS[name]
        if what not in inspect.getsource(inspect.getmodule(getattr(T, where)) or T):
            pytest.skip(f"transformers {T.__version__} has no {what} in {where}")
    torch.manual_seed(0)
    return MAKERS[name]().eval()


def made_bart() -> Any:
    torch.manual_seed(0)
    sizes = {
        f"{part}_{name}": value
        for part in ("encoder", "decoder")
        for name, value in {"layers": 1, "attention_heads": 4, "ffn_dim": 32}.items()
    }
    config = T.BartConfig(
        vocab_size=VOCABULARY, d_model=32, max_position_embeddings=128, init_std=0.5, **sizes
    )
    return T.BartForConditionalGeneration(config).eval()


def tokens(*shape: int, seed: int = 1) -> Tensor:
    """Tokens without a special one."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCABULARY, shape, generator=generator)


def converted(name: str, **options: Any) -> Any:
    """In float64: one draw that rounding changes changes all that follows it."""
    return hf.convert(made(name).double(), **(FEW | options))


@torch.no_grad()
def out(model: Any, ids: Tensor, **options: Any) -> Tensor:
    """Logits or hidden states."""
    return model(input_ids=ids, **options)[0]


def near(actual: Tensor, expected: Tensor) -> None:
    """Equal up to the rounding of matrix products of other shapes."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def generated(model: Any, ids: Tensor, cache: Any = None, **options: Any) -> Tensor:
    if cache is not None:
        options[CACHE] = cache
    settings = {
        "max_new_tokens": 10,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": VOCABULARY,
    }
    torch.manual_seed(0)
    return model.generate(ids, **(settings | options))
