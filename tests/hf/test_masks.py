"""What a row sees: padding, causality, packing, chunks. Lost masks are errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hf_models import CACHE, FEW, LENGTH, made, near, out, tokens
from transformers import AttentionMaskInterface, DynamicCache
from transformers.masking_utils import create_causal_mask

from smartbird import hf
from smartbird.hf.mask import RowMask, row_mask


def converted(name: str, **options: Any) -> Any:
    return hf.convert(made(name), **(FEW | options))


def restarting(*lengths: int) -> torch.Tensor:
    """Positions of packed sequences, int64 [1, T]."""
    return torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)


# ---- lost masks ---------------------------------------------------------------------------------


def test_without_its_mask_function_attention_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    model = converted("llama")
    monkeypatch.delitem(AttentionMaskInterface._global_mapping, "smartbird")
    with pytest.raises(
        ValueError, match=r"attention_mask must come from the mask function .* None"
    ):
        out(model, tokens(2, LENGTH))


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_masks_of_pairs_are_refused(name: str) -> None:
    mask = torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"got a Tensor \[2, 1, 40, 40\]"):
        out(converted(name), tokens(2, LENGTH), attention_mask=mask)


def test_short_masks_are_refused() -> None:
    model, ids = converted("llama"), tokens(2, LENGTH)
    cache = DynamicCache(config=model.config)
    out(model, ids, **{CACHE: cache}, use_cache=True)
    with pytest.raises(ValueError, match=r"attention_mask must be \[B, M\] = \[2, 42\].*\[2, 2\]"):
        out(
            model,
            ids[:, :2],
            **{CACHE: cache},
            use_cache=True,
            attention_mask=torch.ones(2, 2, dtype=torch.int64),
        )


@pytest.mark.parametrize(
    "pattern",
    [
        {"or_mask_function": lambda batch, head, query, key: query >= key},
        {"and_mask_function": lambda batch, head, query, key: key > query - 3},
        {"block_sequence_ids": torch.tensor([[-1, 0, 0, -1, 1, 1]])},
    ],
    ids=["or", "and", "blocks"],
)
def test_other_patterns_are_refused(pattern: dict[str, Any]) -> None:
    model = converted("llama")
    inputs = torch.zeros(1, 6, 32)
    try:
        mask = create_causal_mask(
            config=model.config,
            inputs_embeds=inputs,
            attention_mask=None,
            **{CACHE: None},
            **pattern,
        )
    except TypeError:
        pytest.skip("create_causal_mask has other arguments in this release of transformers")
    assert isinstance(mask, RowMask)
    assert mask.reason == "its mask is a pattern of the model's own"
    with pytest.raises(ValueError, match="cannot serve this call: its mask is a pattern"):
        out(model, tokens(1, 6), attention_mask=mask)


@pytest.mark.parametrize("part", [{"local_size": 2}, {"kv_offset": 1}])
def test_windows_are_refused(part: dict[str, int]) -> None:
    sizes = {"batch_size": 1, "q_length": 3, "kv_length": 3, "q_offset": 0, "kv_offset": 0}
    mask = row_mask(**(sizes | part), attention_mask=None)
    assert mask.reason == "its rows see a window or a chunk of the keys"
    with pytest.raises(ValueError, match="cannot serve this call: its rows see a window"):
        out(converted("llama"), tokens(1, 3), attention_mask=mask)


def test_a_mask_made_twice_is_made_once() -> None:
    sizes = {"batch_size": 1, "q_length": 3, "kv_length": 8, "q_offset": torch.tensor(2)}
    mask = row_mask(**sizes, attention_mask=None)
    assert row_mask(**sizes, attention_mask=mask) is mask
    assert mask.num_keys == 5
    assert sizes["q_offset"] == 2


# ---- padding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2_mixed", "bert", "roberta", "modernbert"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("min_length", [0, 20])
def test_padding_changes_nothing(name: str, side: str, min_length: int) -> None:
    model = converted(name, min_length=min_length)
    ids, lengths = tokens(3, LENGTH), (LENGTH, 27, 13)
    mask = torch.zeros_like(ids)
    positions = torch.zeros_like(ids)
    start = 2 if name == "roberta" else 0
    for row, length in enumerate(lengths):
        real = slice(0, length) if side == "right" else slice(LENGTH - length, LENGTH)
        mask[row, real] = 1
        positions[row, real] = torch.arange(start, start + length)
    options = {"position_ids": positions}
    actual = out(model, ids, attention_mask=mask, **options)
    for row in range(3):
        alone = out(model, ids[row : row + 1, mask[row].bool()])
        near(actual[row, mask[row].bool()], alone[0])


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_holes_change_nothing(name: str) -> None:
    model, ids = converted(name), tokens(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[1, 3] = mask[1, 20:25] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    actual = out(model, ids, attention_mask=mask, position_ids=positions)
    near(actual[0], out(model, ids[:1])[0])
    near(actual[1, mask[1].bool()], out(model, ids[1:, mask[1].bool()])[0])


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_batch_mates_change_nothing(name: str) -> None:
    model, ids = converted(name), tokens(4, LENGTH)
    near(out(model, ids)[2], out(model, ids[2:3])[0])
    near(out(model, ids)[2], out(model, ids.flip(0))[1])


def test_a_row_of_padding_alone_gives_no_nan() -> None:
    model, ids = converted("llama"), tokens(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[1] = 0
    actual = out(model, ids, attention_mask=mask)
    assert actual.isfinite().all()
    near(actual[0], out(model, ids[:1])[0])


# ---- causality and chunks -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "bert_decoder"])
def test_later_tokens_change_nothing_before(name: str) -> None:
    model, ids = converted(name), tokens(1, LENGTH)
    other = ids.clone()
    other[:, 30:] = tokens(1, 10, seed=5)
    near(out(model, ids)[:, :30], out(model, other)[:, :30])


@pytest.mark.parametrize("name", ["bert", "bidirectional_llama"])
def test_later_tokens_count_without_causality(name: str) -> None:
    model, ids = converted(name), tokens(1, LENGTH)
    other = ids.clone()
    other[:, -1] = (ids[:, -1] + 1) % 90 + 4
    assert not torch.allclose(out(model, ids)[:, 0], out(model, other)[:, 0])


@pytest.mark.parametrize("name", ["llama", "qwen2_mixed", "gpt2", "bert_decoder"])
@pytest.mark.parametrize("min_length", [0, 20])
@pytest.mark.parametrize("kind", ["sketch", "dynamic"])
def test_chunks_and_single_tokens_are_one_call(name: str, min_length: int, kind: str) -> None:
    model, ids = converted(name, min_length=min_length), tokens(2, LENGTH)
    expected = out(model, ids)
    cache = hf.SketchCache(model) if kind == "sketch" else DynamicCache(config=model.config)
    parts = [
        out(model, chunk, **{CACHE: cache}, use_cache=True)
        for chunk in ids.split([11, 1, 1, 7, 17, 1, 1, 1], dim=1)
    ]
    near(torch.cat(parts, dim=1), expected)


# ---- packed sequences ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen2_mixed"])
def test_packed_by_positions_is_separate(name: str) -> None:
    model, ids = converted(name), tokens(2, LENGTH)
    lengths = ((11, 20, 9), (25, 15))
    positions = torch.cat([restarting(*each) for each in lengths])
    actual = out(model, ids, position_ids=positions, use_cache=False)
    for row, each in enumerate(lengths):
        alone = [out(model, part)[0] for part in ids[row : row + 1].split(each, dim=1)]
        near(actual[row], torch.cat(alone))


@pytest.mark.parametrize(("name", "start"), [("llama", 0), ("bert", 0), ("roberta", 2)])
def test_packed_by_cumulative_lengths_is_separate(name: str, start: int) -> None:
    model, ids, lengths = converted(name), tokens(1, LENGTH), (11, 20, 9)
    bounds = torch.tensor([0, 11, 31, 40], dtype=torch.int32)
    actual = out(
        model,
        ids,
        position_ids=restarting(*lengths) + start,
        **({"use_cache": False} if name == "llama" else {}),
        cu_seq_lens_q=bounds,
        cu_seq_lens_k=bounds,
        max_length_q=20,
        max_length_k=20,
    )
    alone = [out(model, part)[0] for part in ids.split(lengths, dim=1)]
    near(actual[0], torch.cat(alone))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cu_seq_lens_q": [0, 11, 40]}, "must be the sequences"),
        ({"cu_seq_lens_q": [0, 11, 31]}, "must go from 0 to 40"),
        ({"cu_seq_lens_q": [0, 11, 31, 40], "cu_seq_lens_k": [0, 12, 31, 40]}, "cu_seq_lens_k"),
        ({"cu_seq_lens_k": [0, 40]}, "cu_seq_lens_k must be cu_seq_lens_q"),
    ],
)
def test_contradicting_packs_are_refused(options: dict[str, Any], message: str) -> None:
    bounds = {name: torch.tensor(value, dtype=torch.int32) for name, value in options.items()}
    with pytest.raises(ValueError, match=message):
        out(
            converted("llama"),
            tokens(1, LENGTH),
            position_ids=restarting(11, 20, 9),
            use_cache=False,
            **bounds,
        )


def test_packs_in_a_batch_or_with_padding_are_refused() -> None:
    model, ids = converted("bert"), tokens(2, LENGTH)
    bounds = torch.tensor([0, 11, LENGTH], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seq_lens_q must come with a batch of 1"):
        out(model, ids, cu_seq_lens_q=bounds)
    mask = torch.ones_like(ids[:1])
    mask[0, 5:9] = 0
    with pytest.raises(ValueError, match="cu_seq_lens_q must be the sequences"):
        out(model, ids[:1], cu_seq_lens_q=bounds, attention_mask=mask)
