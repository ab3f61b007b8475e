"""Studies: what they ask, that their runs survive, and that their tables say what came out."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("tokenizers", reason="the extra `bench` is not installed")
pytest.importorskip("matplotlib", reason="the extra `bench` is not installed")

from benchmarks.common import markdown
from benchmarks.learning import cli, study, tasks
from benchmarks.learning.study import report, runner
from benchmarks.learning.tasks import files

ROOT = Path(__file__).parents[2]
HEAD = """
title = "Tiny"
seeds = [0, 1]
"""
BASE = """
[base]
task = "mqar"
seq_len = 32
num_samples = 4
num_pairs = 2
vocab_size = 16
layers = 1
dim = 16
heads = 2
batch_size = 256
steps = 4
eval_every = 2
"""
WHICH = """
[[grid]]
name = "which"
text = "Which attention?"
[[grid.product]]
attention = ["dense", "window"]
"""
SAMPLES = """
[[grid]]
name = "samples"
text = "How many keys?"
[[grid.product]]
attention = ["window", "random"]
num_samples = [4, 8]
[[grid.product]]
attention = ["dense"]
"""


@pytest.fixture
def write(tmp_path):
    def write(*parts: str) -> Path:
        path = tmp_path / "tiny.toml"
        path.write_text("".join(parts))
        return path

    return write


# ---- what is asked ------------------------------------------------------------------------------


def test_a_grid_is_the_union_of_its_products_and_shares_its_runs(write):
    tiny = study.load_study(write(HEAD, BASE, WHICH, SAMPLES))
    which, samples = tiny.grids
    assert [dict(c.fields) for c in which.combinations] == [
        {"attention": "dense"},
        {"attention": "window"},
    ]
    assert [dict(c.fields) for c in samples.combinations] == [
        {"attention": "window", "num_samples": 4},
        {"attention": "window", "num_samples": 8},
        {"attention": "random", "num_samples": 4},
        {"attention": "random", "num_samples": 8},
        {"attention": "dense"},
    ]
    # 4 is num_samples of the base, so two combinations are asked for twice.
    assert samples.combinations[0].runs == which.combinations[1].runs
    assert samples.combinations[4].runs == which.combinations[0].runs
    assert len(tiny.runs) == 2 * 5
    assert [config.seed for config in tiny.runs.values()] == 5 * [0] + 5 * [1]
    for combination in samples.combinations:
        for seed, run in enumerate(combination.runs):
            assert tiny.runs[run] == tasks.default_config(
                "mqar",
                **{
                    "seq_len": 32,
                    "num_samples": 4,
                    "num_pairs": 2,
                    "vocab_size": 16,
                    "layers": 1,
                    "dim": 16,
                    "heads": 2,
                    "batch_size": 256,
                    "steps": 4,
                    "eval_every": 2,
                    "threads": 1,
                    "seed": seed,
                    **combination.fields,
                },
            )


def test_a_run_is_known_by_what_it_is_not_by_where():
    config = tasks.default_config("mqar")
    moved = dataclasses.replace(config, out="elsewhere")
    assert study.run_id(moved) == study.run_id(config)
    for change in ({"threads": 2}, {"lr": 0.1}, {"learning": ("bias",)}, {"eval_every": 7}):
        assert study.run_id(dataclasses.replace(config, **change)) != study.run_id(config)


def test_a_field_that_comes_later_leaves_a_run_its_name():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Later(tasks.Config):
        new: int = 1

    config = tasks.default_config("mqar")
    later = Later(**config.as_dict())
    assert study.run_id(later) == study.run_id(config)
    assert study.run_id(dataclasses.replace(later, new=2)) != study.run_id(config)


def test_the_runs_of_the_documents_keep_their_names():
    for path in sorted((ROOT / "docs" / "learning").glob("*.json")):
        for run, record in json.loads(path.read_text()).get("runs", {}).items():
            config = {
                **record["config"],
                "out": "",
                "learning": tuple(record["config"]["learning"]),
            }
            assert study.run_id(tasks.Config(**config)) == run


def test_values_take_the_type_of_their_field(write):
    product = 'learning = [["distill"], ["distill", "bias"]]\nlr = [1]'
    tiny = study.load_study(
        write(HEAD, BASE, WHICH.replace('attention = ["dense", "window"]', product))
    )
    configs = [tiny.runs[c.runs[0]] for c in tiny.grids[0].combinations]
    assert [config.learning for config in configs] == [("distill",), ("distill", "bias")]
    assert all(type(config.lr) is float for config in configs)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ('title = "Tiny"', "", "title is missing"),
        ('title = "Tiny"', "title = 3", "title must be str, got 3"),
        ("seeds", "seed", "seed must be one of title, seeds"),
        ("seeds = [0, 1]", "seeds = []", "seeds must be a list of values, got []"),
        ("seeds = [0, 1]", "seeds = [0, -1]", "grid which: seed must be from 0"),
        ("[base]", "target_accuracy = 90\n[base]", "target_accuracy must be in (0, 1], got 90"),
        ("steps = 4", "stpes = 4", "base: stpes is no field of a run; did you mean steps?"),
        ("steps = 4", 'steps = "4"', "base: steps must be int, got '4'"),
        ("steps = 4", "steps = true", "base: steps must be int, got True"),
        ("steps = 4", "seed = 4", "base: seed is no field to set here: use seeds"),
        ("steps = 4", "steps = 0", "grid which: steps must be from 1"),
        ("steps = 4", 'learning = "bias"', "base: learning must be tuple[str, ...], got 'bias'"),
        ('task = "mqar"', "", "grid which: task must be given"),
        ('"which"', '"which way"', "name must be letters"),
        ('"which"', '"samples"', "grid samples: there are two of this name"),
        ('text = "Which attention?"', "", "grid which: text is missing"),
        ('["dense", "window"]', '"dense"', "attention must be a list of values, got 'dense'"),
        ('["dense", "window"]', '["none"]', "grid which: attention must be one of"),
        ("[[grid.product]]", "[grid.product]", "grid which: product must be tables"),
        ("[base]", "[base", "line 5"),
    ],
)
def test_a_bad_study_is_one_line_that_names_the_file_and_the_field(
    before, after, said, write, tmp_path, capsys
):
    text = "".join((HEAD, BASE, WHICH, SAMPLES))
    assert before in text
    path = write(text.replace(before, after, 1))
    with pytest.raises(SystemExit) as exit_:
        cli.main(["study", str(path), "--out", str(tmp_path / "out")])
    errors = capsys.readouterr().err
    assert exit_.value.code == 2
    assert len(errors.splitlines()) == 1
    assert str(path) in errors
    assert said in errors
    assert not (tmp_path / "out").exists()


# ---- what is run --------------------------------------------------------------------------------


def test_runs_are_made_once_and_equal_those_of_train(write, tmp_path, capsys):
    path, out = write(HEAD, BASE, WHICH), tmp_path / "out"
    arguments = ["study", str(path), "--out", str(out), "--jobs", "2"]
    assert cli.main(arguments) == 0
    assert "| dense | 2 |" in capsys.readouterr().out
    written = {file: file.stat().st_mtime_ns for file in out.glob("*/*")}
    assert {file.name for file in written} >= {"result.json", "checkpoint.pt", "metrics.jsonl"}

    assert cli.main(arguments) == 0
    assert "4 runs finished" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in out.glob("*/*")} == written

    tiny = study.load_study(path)
    run, config = next(iter(tiny.runs.items()))
    alone = tasks.train(dataclasses.replace(config, out=str(tmp_path / "alone")))
    ours = runner.read_result(dataclasses.replace(config, out=str(out / run)))
    assert (ours.test_accuracy, ours.test_loss) == (alone.test_accuracy, alone.test_loss)
    assert {file.name for file in out.iterdir() if file.is_file()} == {
        *("tiny.md", "tiny.json", "tiny-which.png")
    }
    record = json.loads((out / "tiny.json").read_text())
    assert record["runs"].keys() == tiny.runs.keys()
    assert record["runs"][run]["test_accuracy"] == alone.test_accuracy
    assert [step for step, *_ in record["runs"][run]["valid"]] == [2, 4]
    assert ours.recall == alone.recall == tuple(record["runs"][run]["recall"])
    assert str(tmp_path) not in (out / "tiny.json").read_text()


def test_a_failing_run_is_reported_and_the_others_go_on(write, tmp_path, capsys):
    product = "attention = ['dense']\nnum_pairs = [9, 2]"
    grid = WHICH.replace('attention = ["dense", "window"]', product)
    path = write(HEAD.replace("[0, 1]", "[0]"), BASE, grid)
    code = cli.main(["study", str(path), "--out", str(tmp_path / "out"), "--jobs", "1"])
    captured = capsys.readouterr()
    assert code == 1
    bad, good = study.load_study(path).runs
    assert f"error: {bad}: task mqar: num_pairs must be at most seq_len / 4 = 8" in captured.err
    assert "1 runs finished" in captured.out
    assert (tmp_path / "out" / good / "result.json").exists()
    assert "| 9 | 0 of 1 | - | - | - | - |" in captured.out


def test_a_damaged_result_is_named(write, tmp_path, capsys):
    path, out = write(HEAD, BASE, WHICH), tmp_path / "out"
    run = next(iter(study.load_study(path).runs))
    (out / run).mkdir(parents=True)
    (out / run / "result.json").write_text("{")
    assert cli.main(["study", str(path), "--out", str(out)]) == 1
    errors = capsys.readouterr().err
    assert len(errors.splitlines()) == 1
    assert str(out / run / "result.json") in errors


@pytest.fixture
def one_result(write, tmp_path, capsys):
    """The command of a finished study, and the result of its first run: its file and content."""
    path, out = write(HEAD, BASE, WHICH), tmp_path / "out"
    command = ["study", str(path), "--out", str(out)]
    assert cli.main(command) == 0
    capsys.readouterr()
    result = out / next(iter(study.load_study(path).runs)) / "result.json"
    return command, result, json.loads(result.read_text())


def test_a_result_of_another_configuration_is_refused(one_result, capsys):
    command, result, record = one_result
    record["config"]["lr"] *= 2
    result.write_text(json.dumps(record))
    assert cli.main(command) == 1
    assert f"{result}: is of another configuration" in capsys.readouterr().err


def test_runs_of_different_data_are_not_averaged(one_result, capsys):
    command, result, record = one_result
    assert record["fingerprint"].startswith("mqar-")
    result.write_text(json.dumps({**record, "fingerprint": "mqar-0"}))
    assert cli.main(command) == 1
    error = capsys.readouterr().err
    assert str(result.parent) in error
    assert "were made with different data" in error
    # One from before that was kept is not known to differ.
    del record["fingerprint"]
    result.write_text(json.dumps(record))
    assert cli.main(command) == 0


def test_without_time_nothing_is_run(write, tmp_path, capsys):
    path, out = write(HEAD, BASE, WHICH), tmp_path / "out"
    assert cli.main(["study", str(path), "--out", str(out), "--budget", "0"]) == 0
    assert "4 runs are left" in capsys.readouterr().out
    assert {file.name for file in out.iterdir()} == {"tiny.md", "tiny.json"}


def test_a_run_is_stopped_when_the_time_is_over(write, tmp_path, monkeypatch):
    path = write(HEAD, BASE.replace("steps = 4", "steps = 1000000"), WHICH)
    tiny = study.load_study(path)
    started, start = [], runner._start

    def start_and_wait_for_a_checkpoint(config):
        worker = start(config)
        checkpoint = Path(config.out) / files.CHECKPOINT
        while not checkpoint.exists():
            assert worker.process.is_alive()
            time.sleep(0.02)
        started.append(checkpoint)
        return worker

    monkeypatch.setattr(runner, "_start", start_and_wait_for_a_checkpoint)
    progress = runner.execute(tiny.runs, tmp_path, jobs=1, budget=0.5)
    assert progress == runner.Progress(finished={}, failed={}, left=tuple(tiny.runs))
    assert not multiprocessing.active_children()
    (checkpoint,) = started
    assert "stopped at step" in (checkpoint.parent / runner.LOG).read_text()
    files.load_checkpoint(checkpoint)


def test_a_run_can_be_stopped_before_it_has_begun(write, tmp_path, monkeypatch):
    """However early, and where a shell has the study ignore Ctrl-C."""

    def press_ctrl_c(*_):
        raise KeyboardInterrupt

    path = write(HEAD, BASE.replace("steps = 4", "steps = 1000000"), WHICH)
    monkeypatch.setattr(runner, "_ended", press_ctrl_c)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(tasks.Interrupted):
            runner.execute(study.load_study(path).runs, tmp_path, jobs=2)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_study_goes_on_after_ctrl_c_and_after_a_kill(number, write, tmp_path):
    base = BASE.replace("steps = 4", "steps = 100\ncheckpoint_every = 5\nlog_every = 50")
    base = base.replace("batch_size = 256", "batch_size = 64").replace("_every = 2", "_every = 100")
    one = WHICH.replace(', "window"', "")
    path, out = write(HEAD.replace("[0, 1]", "[0]"), base, one), tmp_path / "out"
    command = [sys.executable, "-m", "benchmarks.learning", "study", str(path), "--out", str(out)]
    tiny = study.load_study(path)
    (run,) = tiny.runs
    checkpoint = out / run / files.CHECKPOINT
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
        # A shell ignores it for what it runs in the background, and so for these tests.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not checkpoint.exists() or files.load_checkpoint(checkpoint)["step"] == 0:
        assert process.poll() is None
        time.sleep(0.02)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    _, errors = process.communicate()
    if number == signal.SIGINT:
        assert process.returncode == cli.EXIT_INTERRUPTED
        assert errors == f"{cli.PROG} study: stopped; the same command goes on from here\n"
        assert not (out / run / runner.RESULT).exists()
    else:
        assert (process.returncode, errors) == (-signal.SIGKILL, "")

    # A run that does not go on from its checkpoint would be refused its directory, and fail.
    progress = runner.execute(tiny.runs, out, jobs=1)
    assert (list(progress.finished), progress.failed, progress.left) == ([run], {}, ())
    rows = tasks.read_metrics(out / run / files.METRICS)
    assert [row["step"] for row in rows if row["split"] == "train"] == [50, 100]


# ---- what came out ------------------------------------------------------------------------------

#            test accuracies, validation accuracies at steps 2 and 4, seconds, MiB, recall by layer
FINDINGS = {
    ("dense", 0): (0.90, (0.50, 0.95), 4.0, 100.0, (0.8, 0.6)),
    ("dense", 1): (0.94, (0.91, 0.92), 8.0, 104.0, (1.0, 0.8)),
    ("window", 0): (0.10, (0.10, 0.12), 2.0, 50.0, ()),
}


@pytest.fixture
def found(write, tmp_path):
    """A study with results made up: both runs of dense, one of two of window."""
    tiny = study.load_study(write(HEAD, BASE, WHICH, SAMPLES))
    results = {}
    for run, config in tiny.runs.items():
        finding = FINDINGS.get((config.attention, config.seed))
        if finding is None:
            continue
        test, valid, seconds, mib, recall = finding
        config = dataclasses.replace(config, out=str(tmp_path / run))
        Path(config.out).mkdir()
        rows = [{"step": s, "split": "train", "accuracy": 1.0} for s in (1, 2, 3, 4)]
        rows += [
            {"step": step, "split": "valid", "accuracy": accuracy, "seconds": 10.0 * step}
            for step, accuracy in zip((2, 4), valid, strict=True)
        ]
        (Path(config.out) / files.METRICS).write_text("\n".join(map(json.dumps, rows)))
        results[run] = tasks.Result(
            config, 1.0, test, 1.0, valid[1], 0.125, seconds, mib, 1000, recall
        )
    return tiny, results


def test_the_table_holds_means_and_sample_standard_deviations(found):
    table = report.tables(*found, "python -m benchmarks.learning study tiny.toml")["which"]
    # Two values a, b: (a + b) / 2 ± |a - b| / sqrt(2). Steps: 4 and 2 are the first at 90 %.
    assert table.splitlines()[:4] == [
        "| attention | runs | test accuracy, % | recall at K, % | steps to 90 % | s to 90 % "
        "| ms per step | peak MiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| dense | 2 | 92.0 ± 2.8 | 90, 70 | 3 ± 1 | 30 ± 14 | 1500 ± 707 | 102 ± 3 |",
        "| window | 1 of 2 | 10.0 | - | - (0 of 1) | - | 500 | 50 |",
    ]
    assert "12.5%" in table
    assert "`python -m benchmarks.learning study tiny.toml`" in table


def test_a_field_that_a_product_does_not_name_is_a_dash(found):
    lines = report.tables(*found, "-")["samples"].splitlines()
    assert lines[0].startswith("| attention | num_samples | runs |")
    assert lines[2].startswith("| window | 4 | 1 of 2 | 10.0 |")
    assert lines[4].startswith("| random | 4 | 0 of 2 | - |")
    assert lines[6].startswith("| dense | - | 2 | 92.0")


def test_plots_show_the_means(found):
    tiny, results = found
    which, samples = (report.plot_grid(g, report.grid_rows(g, results)) for g in tiny.grids)
    for figure, labels in (
        (which, ["dense", "window"]),
        (samples, ["window, num_samples 4", "window, num_samples 8", "dense"]),
    ):
        curves = {line.get_label(): line for line in figure.axes[1].get_lines()}
        assert list(curves) == labels
        assert list(curves["dense"].get_xdata()) == [2, 4]
        assert list(curves["dense"].get_ydata()) == pytest.approx([70.5, 93.5])
        assert list(curves[labels[1]].get_ydata()) == pytest.approx([10.0, 12.0])
    assert [text.get_text() for text in which.axes[0].get_yticklabels()] == ["dense", "window"]
    accuracy = samples.axes[0]
    assert (accuracy.get_xlabel(), accuracy.get_ylabel()) == ("num_samples", "test accuracy, %")
    window, dense = accuracy.get_lines()[0], accuracy.get_lines()[-1]
    assert list(window.get_xdata()) == [4, 8]
    assert list(window.get_ydata()) == pytest.approx([10.0, 10.0])
    assert list(dense.get_ydata()) == pytest.approx([92.0, 92.0])  # a line across


PAGE = """# Prose
<!-- table tiny:which -->
old
<!-- end -->
More | prose <!-- end -->
<!-- table other:which -->
kept
<!-- end -->
<!-- table tiny:samples -->
<!-- end -->
"""


def test_a_page_keeps_its_prose(found):
    tiny, results = found
    made = report.tables(tiny, results, "-")
    page = report.update_page(PAGE, tiny, made)
    assert page == (
        PAGE.replace("old\n", made["which"]).replace(
            "tiny:samples -->\n", f"tiny:samples -->\n{made['samples']}"
        )
    )
    assert report.update_page(page, tiny, made) == page
    assert report.update_page(page, tiny, {}) == page  # what is not finished here is not lost


@pytest.mark.parametrize(
    ("page", "said"),
    [
        ("<!-- table tiny:no -->\n<!-- end -->\n", "tiny:no must name a grid of which, samples"),
        ("<!-- table tiny:which -->\nprose\n" + PAGE, "tiny:which must end with <!-- end -->"),
    ],
)
def test_a_page_with_a_wrong_marker_is_refused_before_anything_runs(
    page, said, write, tmp_path, capsys
):
    path, out = write(HEAD, BASE, WHICH, SAMPLES), tmp_path / "out"
    (tmp_path / "page.md").write_text(page)
    with pytest.raises(SystemExit):
        cli.main(["study", str(path), "--out", str(out), "--page", str(tmp_path / "page.md")])
    assert said in capsys.readouterr().err
    assert (tmp_path / "page.md").read_text() == page
    assert not out.exists()


def test_the_page_of_a_study_gets_tables_plots_and_numbers(write, tmp_path):
    path, page = write(HEAD.replace("[0, 1]", "[0]"), BASE, WHICH), tmp_path / "learning.md"
    page.write_text(PAGE.replace("tiny:samples", "other:samples"))
    progress, made = study.run_study(path, tmp_path / "out", jobs=2, page=page)
    assert len(progress.finished) == 2
    assert made["which"] in page.read_text()
    assert {file.name for file in (tmp_path / "learning").iterdir()} == {
        *("tiny.json", "tiny-which.png")
    }


def test_a_markdown_table():
    assert markdown.table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n"


@pytest.mark.parametrize("path", sorted(ROOT.glob("studies/*.toml")))
def test_the_studies_of_the_repository_can_be_read(path):
    assert len(study.load_study(path).runs) > 1


def test_a_number_that_few_rows_have_is_no_axis(write):
    several = 'attention = ["dense", "window"]\n[[grid.product]]\nnum_samples = [4, 8]\n'
    several += "[[grid.product]]\nlr = [0.01]\n[[grid.product]]\ndim = [8]\n"
    tiny = study.load_study(
        write(HEAD, BASE, WHICH.replace('attention = ["dense", "window"]', several))
    )
    rows = report.grid_rows(tiny.grids[0], {})
    assert len(rows) == 6
    assert report._number_field(rows) is None
    assert report._number_field(rows[:4]) == "num_samples"
