"""The benchmark of embeddings on a tiny random encoder: what it measures, and its page."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the extra `hf` is not installed")

from scipy.stats import spearmanr
from transformers import BertConfig, BertModel

from benchmarks.common.markdown import update_page
from benchmarks.common.records import write_json
from benchmarks.language import embeddings as program
from benchmarks.language.embeddings import (
    DENSE,
    TABLES,
    WAYS,
    Embeddings,
    Quality,
    Time,
    cut,
    embed,
    measure,
    recall,
    similarities,
    spearman,
)
from smartbird.hf import convert

VOCABULARY, LENGTH, COUNT = 97, 160, 12


def tiny() -> Any:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.2,
    )
    return BertModel(config).eval()


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, shape, generator=generator)


def short_texts(texts: list[str], **options: Any) -> Any:
    """A tokenizer that makes ten tokens of any text."""
    return SimpleNamespace(
        input_ids=tokens(len(texts), 10), attention_mask=torch.ones(len(texts), 10)
    )


@pytest.fixture(scope="module")
def results() -> Embeddings:
    model = convert(tiny(), calibration=tokens(1, LENGTH, seed=1))
    passages = tokens(COUNT, LENGTH)
    found = list(measure(model, short_texts, ["text"] * COUNT, passages, (0, 1)))
    environment = {
        "cpu": "a processor",
        "smartbird": {"cpu_isa": "avx2"},
        "torch": "2",
        "transformers": "5",
        "python": "3",
        "date": "2026-01-01T00:00:00",
        "commit": "abc",
        "seconds": 60.0,
        "load_before": (0.0, 0.0, 0.0),
    }
    return Embeddings(
        environment,
        COUNT,
        4,
        [one for one in found if isinstance(one, Quality)],
        [one for one in found if isinstance(one, Time)],
    )


def test_every_way_is_measured(results: Embeddings) -> None:
    assert [one.way for one in results.times] == [DENSE, *WAYS]
    told = [(one.way, one.seed) for one in results.qualities]
    assert told == [(DENSE, 0), *((way, seed) for way in WAYS for seed in (0, 1))]
    dense, *sampled = results.qualities
    assert dense.cosine == pytest.approx(1)
    assert dense.spearman == pytest.approx(1)
    assert all(0.9 < one.least_cosine <= one.cosine for one in sampled)
    by_keys = {one.way.num_samples: one.cosine for one in sampled if one.way.window == 0}
    assert by_keys[32] < by_keys[64] < by_keys[128]
    # Other seeds draw other keys.
    assert len({one.cosine for one in sampled}) == len(sampled)


def test_a_page_is_made_of_what_was_kept(results: Embeddings, tmp_path: Path) -> None:
    path, page = tmp_path / "minilm.json", tmp_path / "page.md"
    write_json(path, results)
    again = Embeddings.load(path)
    assert [one.way for one in again.qualities] == [one.way for one in results.qualities]
    page.write_text("".join(f"<!-- table minilm:{name} -->\n<!-- end -->\n" for name in TABLES))
    update_page(page, "minilm", again, TABLES)
    for make in TABLES.values():
        assert make(again) in page.read_text()
    assert "| K = 64, 36 of them forced |" in page.read_text()


def test_padding_changes_no_embedding() -> None:
    model, ids = tiny(), tokens(1, 10)
    padded = torch.cat([ids, torch.zeros_like(ids)], dim=1)
    mask = (torch.arange(20) < 10).long()[None]
    torch.testing.assert_close(embed(model, padded, mask), embed(model, ids))


def test_rank_correlation_is_that_of_scipy() -> None:
    x = torch.randn(50)
    y = x + torch.randn(50)
    assert spearman(x, y) == pytest.approx(spearmanr(x, y).statistic)
    assert spearman(x, x.exp()) == pytest.approx(1)


def test_similarities_are_of_each_pair_once() -> None:
    x = torch.eye(3) + 1
    torch.testing.assert_close(similarities(x), torch.tensor([5.0, 5.0, 5.0]))


def test_recall_counts_sentences_that_find_their_passage() -> None:
    passages = torch.eye(4)
    sentences = passages[[0, 2, 1, 3]] + 0.5 * torch.eye(4)
    assert recall(sentences, passages, 1) == 0.5
    assert recall(sentences, passages, 2) == 1.0


def test_a_sentence_is_cut_out() -> None:
    text = "The end of one. This one sentence has just about nine words. Short one. And the"
    sentence, rest = cut(text, seed=0)
    assert sentence == "This one sentence has just about nine words."
    assert rest == "The end of one.  Short one. And the"
    with pytest.raises(ValueError, match="8 to 40 words"):
        cut("None. At all. Here.", seed=0)


def test_documents_of_measurements_calibrate_nothing() -> None:
    for kind, names in program.DOCUMENTS.items():
        assert program.KINDS[kind].calibration not in names


def test_missing_packages_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.language.model.find_spec", lambda name: None)
    assert program.main([]) == 1
    assert "pip install" in capsys.readouterr().err
