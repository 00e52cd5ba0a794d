"""Arms over seeds, on committed records against SciPy and hand computation; their tables, texts and pictures."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
from scipy import stats

from wdat.cli.collect import main
from wdat.errors import SettingError
from wdat.records import read, write
from wdat.reporting.compare import compare, paired, spread
from wdat.reporting.dots import dots
from wdat.reporting.formats import latex, to_csv, to_latex, to_markdown
from wdat.reporting.report import render_collection
from wdat.reporting.runs import find

RESULTS = Path(__file__).parents[2] / "results"
SEEDS = {s: read(RESULTS / "quickstart" / f"seed{s}.json") for s in range(3)}


def arm(folder, shift=0.0, seeds=(0, 1, 2), overrides=None, n=None, number=0):
    """Runs of one arm: the committed ones, their accuracies after training shifted by seed."""
    for s in seeds:
        made = [replace(r, accuracy=r.accuracy + shift * (s + 1), n=n or r.n) if r.stage == "after" else r
                for r in SEEDS[s]]  # fmt: skip
        place = folder / (f"seed{s}" if overrides is None else str(number + s))
        write(place / "records.json", made)
        if overrides is not None:
            (place / ".hydra").mkdir()
            listed = [*overrides, f"seed={s}"]
            (place / ".hydra" / "overrides.yaml").write_text("".join(f"- {json.dumps(o)}\n" for o in listed))
            (place / ".hydra" / "hydra.yaml").write_text(f"hydra: {{job: {{name: train}}, runtime: {{cwd: {folder}}}}}")


def pick(comparison, attack="wpgd", delta=0.1, name=None):
    (row,) = [r for r in comparison.rows if (r.attack, r.delta) == (attack, delta) and name in (None, r.arm)]
    return row


def accuracies(stage, attack, delta):
    return [next(r.accuracy for r in SEEDS[s] if (r.stage, r.attack, r.delta) == (stage, attack, delta)) for s in SEEDS]


@pytest.mark.parametrize("stage", ["before", "after"])
def test_three_seeds_give_the_mean_and_deviation_of_hand_computation(stage):
    row = pick(compare(find([RESULTS / "quickstart"])))
    values, found = accuracies(stage, "wpgd", 0.1), row.over_seeds(stage)
    mean = sum(values) / 3
    assert found.mean == pytest.approx(mean)
    assert found.sd == pytest.approx((sum((v - mean) ** 2 for v in values) / 2) ** 0.5)
    interval = stats.t.interval(0.95, 2, loc=mean, scale=stats.sem(values))
    assert (found.low, found.high) == pytest.approx(interval)
    assert found.seeds == (0, 1, 2)


def test_the_change_is_scipys_paired_one():
    change = pick(compare(find([RESULTS / "quickstart"]))).change
    test = stats.ttest_rel(accuracies("after", "wpgd", 0.1), accuracies("before", "wpgd", 0.1))
    interval = test.confidence_interval(0.95)
    assert (change.low, change.high) == pytest.approx((interval.low, interval.high))


def test_differences_to_a_baseline_are_scipys_paired_ones(tmp_path):
    arm(tmp_path / "plain")
    arm(tmp_path / "other", shift=0.01)
    found = compare(find([tmp_path]), baseline="plain")
    assert found.arms == ["other", "plain"]
    stage, d = found.difference(pick(found, name="other"))
    own = accuracies("after", "wpgd", 0.1)
    test = stats.ttest_rel([v + 0.01 * (s + 1) for s, v in enumerate(own)], own)
    interval = test.confidence_interval(0.95)
    assert stage == "after"
    assert d.mean == pytest.approx(0.02)
    assert (d.low, d.high) == pytest.approx((interval.low, interval.high))
    assert found.difference(pick(found, name="plain")) is None
    assert "| +2.00 [-0.48, +4.48] (n = 3) |" in to_markdown(found)
    assert "| baseline |" in to_markdown(found)
    assert "95 % t-intervals over n seeds" in to_markdown(found)


def test_pairs_have_seed_and_number_of_images_in_common(tmp_path):
    arm(tmp_path / "a", seeds=(0, 1))
    arm(tmp_path / "b", seeds=(1, 2), shift=0.01)
    found = compare(find([tmp_path]), baseline="a")
    d = found.difference(pick(found, name="b"))[1]
    assert d.seeds == (1,)
    assert d.low is None
    assert "| +2.00 (n = 1) |" in to_markdown(found)
    one = SEEDS[0][0]
    assert paired({0: one}, {0: replace(one, n=7)}) is None
    assert spread({}) is None


def test_different_numbers_of_images_in_a_row_are_said(tmp_path):
    arm(tmp_path / "a", seeds=(0, 1))
    write(tmp_path / "a" / "seed2" / "records.json", [replace(r, n=100) for r in SEEDS[2]])
    text = to_markdown(compare(find([tmp_path])))
    assert "| 100–360 |" in text
    assert "different numbers of images" in text


def test_arms_of_a_sweep_are_the_settings_that_differ(tmp_path):
    common = ["experiment=quickstart", "hydra.run.dir=x", "logger=csv"]
    arm(tmp_path, overrides=[*common, "objective=wdat"])
    arm(tmp_path, overrides=[*common, "objective=trades"], number=3)
    runs = find([tmp_path])
    assert [(run.arm, run.seeds) for run in runs] == [
        (f"objective={o}", [s]) for o in ("wdat", "trades") for s in range(3)
    ]
    command = "python train.py experiment=quickstart hydra.run.dir=x logger=csv objective=wdat seed=0"
    assert runs[0].command == command
    assert command in render_collection(compare(runs), runs)
    assert compare(runs, baseline="objective=wdat").baseline == "objective=wdat"
    assert [run.arm for run in find([tmp_path], "folder")] == [*[tmp_path.name] * 3, "3", "4", "5"]


def test_an_evaluation_belongs_to_the_arm_that_left_its_checkpoint(tmp_path):
    arm(tmp_path / "t", overrides=["objective=wdat"])
    arm(tmp_path / "t", overrides=["objective=trades"], number=3)
    write(tmp_path / "e" / "records.json", [replace(r, stage="evaluate") for r in SEEDS[1] if r.stage == "after"])
    (tmp_path / "e" / ".hydra").mkdir()
    lines = [f"model.checkpoint={tmp_path}/t/4/checkpoints/best.ckpt", "data=digits", "deltas=[0.1]", "seed=1"]
    (tmp_path / "e" / ".hydra" / "overrides.yaml").write_text("".join(f"- {json.dumps(x)}\n" for x in lines))
    found = compare(find([tmp_path / "t", tmp_path / "e"]))
    assert found.arms == ["objective=wdat", "objective=trades"]
    assert set(pick(found, name="objective=trades").records) == {"before", "after", "evaluate"}


def test_keys_in_a_command_are_masked(tmp_path):
    arm(tmp_path, seeds=(0,), overrides=["logger.api_key=abc123"])
    (run,) = find([tmp_path])
    assert "abc123" not in run.command
    assert "logger.api_key=***" in run.command.replace("'", "")


def test_one_seed_measured_twice_is_said(tmp_path):
    arm(tmp_path / "a" / "x", seeds=(0,), overrides=["objective=wdat"])
    arm(tmp_path / "a" / "y", seeds=(0,), overrides=["objective=wdat"], shift=0.1)
    text = to_markdown(compare(find([tmp_path])))
    assert "have the seed 0: the one read last counts" in text


def test_files_of_one_folder_that_contradict_each_other_are_arms(tmp_path):
    for name, shift in (("wdat", 0.0), ("trades", 0.1)):
        for s in (0, 1):
            write(tmp_path / f"{name}_seed{s}.json", [replace(r, accuracy=r.accuracy + shift) for r in SEEDS[s]])
    assert {run.arm.rpartition("/")[2] for run in find([tmp_path])} == {"wdat", "trades"}


def test_a_baseline_may_be_a_network():
    found = compare(find([RESULTS / "evaluate"]), baseline="cnn_a")
    rows = [row for row in found.rows if row.network == "resnet2b"]
    assert all(found.difference(row) for row in rows)
    assert {found.reference(row).network for row in rows} == {"cnn_a"}


def test_an_unknown_baseline_is_an_error_that_names_the_arms():
    with pytest.raises(SettingError, match=r"--baseline 'x' .* 'quickstart'; 'small_cnn'"):
        compare(find([RESULTS / "quickstart"]), baseline="x")


def test_epochs_alone_are_no_table(tmp_path):
    write(tmp_path / "records.json", [r for r in SEEDS[0] if r.stage == "epoch"])
    with pytest.raises(SettingError, match="let a run finish"):
        compare(find([tmp_path]))


def test_csv_has_raw_numbers():
    found = compare(find([RESULTS / "quickstart", RESULTS / "quickstart_knapsack"]))
    lines = list(csv.DictReader(io.StringIO(to_csv(found))))
    (line,) = [x for x in lines if (x["attack"], x["stage"], x["delta"]) == ("wpgd", "after", "0.1")]
    values = accuracies("after", "wpgd", 0.1)
    assert float(line["mean"]) == pytest.approx(statistics.fmean(values))
    assert float(line["sd"]) == pytest.approx(statistics.stdev(values))
    assert [float(v) for v in line["accuracies"].split()] == values
    assert (line["p"], line["n"], line["images"], line["seeds"]) == ("2.0", "3", "360", "0 1 2")
    assert {x["p"] for x in lines if x["attack"] == "pgd"} == {"inf"}


def test_csv_text_is_no_formula(tmp_path):
    write(tmp_path / "records.json", [replace(r, network="=HYPERLINK(1)") for r in SEEDS[0]])
    lines = list(csv.DictReader(io.StringIO(to_csv(compare(find([tmp_path]))))))
    assert {line["network"] for line in lines} == {"'=HYPERLINK(1)"}


def test_latex_is_a_booktabs_table_whose_text_is_text(tmp_path):
    write(tmp_path / "records.json", [replace(r, network=r"a_b & 5 % #1 \\input{x} $y$ ~^") for r in SEEDS[0]])
    text = to_latex(compare(find([tmp_path])))
    body = text[text.index("\\midrule") : text.index("\\bottomrule")].splitlines()[1:-1]
    assert all(line.endswith(" \\\\") for line in body)
    columns = re.search(r"begin\{tabular\}\{([lr]+)\}", text)[1]
    assert {len(re.findall(r"(?<!\\)&", line)) + 1 for line in body} == {len(columns)}
    for line in body:
        assert "\\input" not in line
        assert not re.search(r"(?<!\\)[%#]", line)
    for word in ("toprule", "midrule", "bottomrule", "end{tabular}", "end{table}", "caption", "label"):
        assert text.count(f"\\{word}") == 1
    assert latex("\N{CJK UNIFIED IDEOGRAPH-4E2D}é") == "U+4E2Dé"


@pytest.mark.parametrize("count", [1, 2, 12])
def test_the_figure_has_room_for_every_arm(tmp_path, count):
    names = [f"objective=combined, attack=knapsack_budget, number={i}" for i in range(count)]
    for i, name in enumerate(names):
        arm(tmp_path, overrides=name.split(", "), number=3 * i, shift=0.001 * i)
    figure = dots(compare(find([tmp_path])))
    figure.draw_without_rendering()
    assert len(figure.axes) == (1 if count == 1 else 7)
    for axes in figure.axes:
        boxes = [text.get_window_extent() for text in axes.get_yticklabels()]
        boxes.sort(key=lambda box: -box.y0)
        assert all(upper.y0 >= lower.y1 - 2 for upper, lower in itertools.pairwise(boxes))
        assert all(box.x0 >= -1 for box in boxes)


def test_the_figure_draws_what_the_table_says():
    figure = dots(compare(find([RESULTS / "quickstart"])), columns=1)
    (axes,) = figure.axes
    drawn = {round(float(c[0].get_xdata()[0]), 6) for c in axes.containers}
    wanted = {
        round(100 * statistics.fmean(accuracies(s, "wpgd", d)), 6) for s in ("before", "after") for d in (0.1, 0.2)
    }
    assert wanted <= drawn


def test_everything_is_written_at_once(tmp_path, capsys):
    main([str(RESULTS / "quickstart"), "--output", str(tmp_path / "deep" / "out")])
    names = {"table.md", "table.csv", "table.tex", "figure.png", "report.html"}
    assert {path.name for path in (tmp_path / "deep" / "out").iterdir()} == names
    assert {Path(line).name for line in capsys.readouterr().out.splitlines()} == names
    main([str(RESULTS / "quickstart"), "--format", "csv"])
    assert capsys.readouterr().out == (tmp_path / "deep" / "out" / "table.csv").read_text()


def test_no_name_writes_html(tmp_path):
    write(tmp_path / "records.json", [replace(r, network="<script>alert(1)</script>") for r in SEEDS[0]])
    runs = find([tmp_path])
    assert "<script" not in render_collection(compare(runs), runs)
