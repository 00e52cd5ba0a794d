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

import pandas as pd
import pytest
from sampled import sampled
from scipy import stats

from wdat.cli.collect import main
from wdat.errors import SettingError
from wdat.records import read, write
from wdat.reporting.compare import CHANGE, DIFFERENCE, compare, over_seeds
from wdat.reporting.dot_plot import dot_plot
from wdat.reporting.report import render_collection
from wdat.reporting.runs import find
from wdat.reporting.tables import collected, to_csv, to_latex, to_markdown

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


def pick(comparison, figure, attack="wpgd", delta=0.1, name=None):
    """The one line of a figure of a row; None where there is none."""
    f = comparison.figures
    chosen = f[(f["attack"] == attack) & (f["delta"] == delta) & (f["figure"] == figure)]
    chosen = chosen[chosen["arm"] == name] if name else chosen
    assert len(chosen) <= 1
    return None if chosen.empty else chosen.iloc[0]


def accuracies(stage, attack, delta):
    return [next(r.accuracy for r in SEEDS[s] if (r.stage, r.attack, r.delta) == (stage, attack, delta)) for s in SEEDS]


@pytest.mark.parametrize("stage", ["before", "after"])
def test_three_seeds_give_the_mean_and_deviation_of_hand_computation(stage):
    values, found = accuracies(stage, "wpgd", 0.1), pick(compare(find([RESULTS / "quickstart"])), stage)
    mean = sum(values) / 3
    assert found["mean"] == pytest.approx(mean)
    assert found["sd"] == pytest.approx((sum((v - mean) ** 2 for v in values) / 2) ** 0.5)
    interval = stats.t.interval(0.95, 2, loc=mean, scale=stats.sem(values))
    assert (found["low"], found["high"]) == pytest.approx(interval)
    assert (found["seeds"], found["values"]) == ((0, 1, 2), tuple(values))


def test_one_seed_has_the_interval_over_images():
    found = pick(compare(find([RESULTS / "quickstart" / "seed0.json"])), "after")
    record = next(r for r in SEEDS[0] if (r.stage, r.attack, r.delta) == ("after", "wpgd", 0.1))
    assert (found["low"], found["high"]) == (record.accuracy_low, record.accuracy_high)
    assert pd.isna(found["sd"])


def test_the_change_is_scipys_paired_one():
    change = pick(compare(find([RESULTS / "quickstart"])), CHANGE)
    test = stats.ttest_rel(accuracies("after", "wpgd", 0.1), accuracies("before", "wpgd", 0.1))
    interval = test.confidence_interval(0.95)
    assert (change["low"], change["high"]) == pytest.approx((interval.low, interval.high))


def test_differences_to_a_baseline_are_scipys_paired_ones(tmp_path):
    arm(tmp_path / "plain")
    arm(tmp_path / "other", shift=0.01)
    found = compare(find([tmp_path]), baseline="plain")
    assert found.arms == ["other", "plain"]
    d = pick(found, DIFFERENCE, name="other")
    own = accuracies("after", "wpgd", 0.1)
    test = stats.ttest_rel([v + 0.01 * (s + 1) for s, v in enumerate(own)], own)
    interval = test.confidence_interval(0.95)
    assert d["mean"] == pytest.approx(0.02)
    assert (d["low"], d["high"]) == pytest.approx((interval.low, interval.high))
    assert pick(found, DIFFERENCE, name="plain") is None
    assert "| +2.00 [-0.5, +4.5] |" in to_markdown(collected(found))
    assert "| baseline |" in to_markdown(collected(found))
    assert "95 % t-intervals over seeds" in to_markdown(collected(found))


def test_pairs_have_seed_and_number_of_images_in_common(tmp_path):
    arm(tmp_path / "a", seeds=(0, 1))
    arm(tmp_path / "b", seeds=(1, 2), shift=0.01)
    d = pick(compare(find([tmp_path]), baseline="a"), DIFFERENCE, name="b")
    assert d["seeds"] == (1,)
    assert pd.isna(d["low"])
    assert d["mean"] == pytest.approx(0.02)


def test_no_difference_is_taken_between_different_numbers_of_images(tmp_path):
    arm(tmp_path / "a", n=100)
    found = compare(find([tmp_path]))
    assert CHANGE not in set(found.figures["figure"])
    assert set(found.figures["n"]) == {100, 360}, "rows of their own"
    arm(tmp_path / "b")
    assert pick(compare(find([tmp_path]), baseline="a"), DIFFERENCE, name="b")["figure"] == DIFFERENCE  # of `before`
    assert pick(compare(find([tmp_path]), ["after"], baseline="a"), DIFFERENCE, name="b") is None


def test_groups_over_seeds_are_apart():
    frame = pd.DataFrame({"a": ["x", "x", "y"], "seed": [1, 0, 0], "accuracy": [0.6, 0.4, 0.3]})
    found = over_seeds(frame, ["a"]).set_index("a")
    assert found.loc["x", "values"] == (0.4, 0.6)
    assert found.loc["y", ["mean", "count"]].tolist() == [0.3, 1]
    assert pd.isna(found.loc["y", "low"])


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
    assert {f for f in ("before", "after", "evaluate") if pick(found, f, name="objective=trades") is not None} == {
        "before", "after", "evaluate"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("override", "shown"),
    [
        ("logger.api_key=abc123", "logger.api_key=***"),
        ("+logger.tokens=[abc123]", "+logger.tokens=***"),
        ("logger.settings={entity:me,token:abc123,mode:x}", "logger.settings={entity:me,token:***,mode:x}"),
        ("++logger.credentials={user:me,key:abc123}", "++logger.credentials=***"),
    ],
)
def test_keys_in_a_command_are_masked(tmp_path, override, shown):
    arm(tmp_path, seeds=(0,), overrides=[override])
    (run,) = find([tmp_path])
    assert "abc123" not in run.command
    assert shown in run.command.replace("'", "")


def test_one_seed_measured_twice_is_said(tmp_path):
    arm(tmp_path / "a" / "x", seeds=(0,), overrides=["objective=wdat"])
    arm(tmp_path / "a" / "y", seeds=(0,), overrides=["objective=wdat"], shift=0.1)
    text = to_markdown(collected(compare(find([tmp_path]))))
    assert "have the seed 0: the one read last counts" in text


def test_files_of_one_folder_that_contradict_each_other_are_arms(tmp_path):
    for name, shift in (("wdat", 0.0), ("trades", 0.1)):
        for s in (0, 1):
            write(tmp_path / f"{name}_seed{s}.json", [replace(r, accuracy=r.accuracy + shift) for r in SEEDS[s]])
    assert {run.arm.rpartition("/")[2] for run in find([tmp_path])} == {"wdat", "trades"}


def test_a_baseline_may_be_a_network():
    found = compare(find([RESULTS / "evaluate"]), baseline="cnn_a")
    differences = found.figures[found.figures["figure"] == DIFFERENCE]
    assert set(differences["network"]) == {"resnet2b"}
    assert len(differences) == 11


def test_arms_without_a_stage_in_common_have_no_difference(tmp_path):
    write(tmp_path / "a" / "records.json", SEEDS[0])
    write(tmp_path / "b" / "records.json", [replace(r, stage="evaluate") for r in SEEDS[0] if r.stage == "after"])
    found = compare(find([tmp_path]), baseline="a")
    grid = collected(found)
    assert set(grid.cells[DIFFERENCE]) == {"baseline", "–"}
    assert "baseline" in to_latex(grid)


def test_an_unknown_baseline_is_an_error_that_names_the_arms():
    with pytest.raises(SettingError, match=r"--baseline 'x' .* 'quickstart'; 'small_cnn'"):
        compare(find([RESULTS / "quickstart"]), baseline="x")


def test_epochs_alone_are_no_table(tmp_path):
    write(tmp_path / "records.json", [r for r in SEEDS[0] if r.stage == "epoch"])
    with pytest.raises(SettingError, match="let a run finish"):
        compare(find([tmp_path]))


def test_csv_has_raw_numbers():
    found = compare(find([RESULTS / "quickstart"]))
    lines = list(csv.DictReader(io.StringIO(to_csv(found))))
    (line,) = [x for x in lines if (x["attack"], x["figure"], x["delta"]) == ("wpgd", "after", "0.1")]
    values = accuracies("after", "wpgd", 0.1)
    assert float(line["mean"]) == pytest.approx(statistics.fmean(values))
    assert float(line["sd"]) == pytest.approx(statistics.stdev(values))
    assert [float(v) for v in line["values"].split()] == values
    assert (line["p"], line["count"], line["n"], line["seeds"]) == ("2.0", "3", "360", "0 1 2")
    assert {x["p"] for x in lines if x["attack"] == "pgd"} == {"inf"}


def test_csv_text_is_no_formula(tmp_path):
    write(tmp_path / "records.json", [replace(r, network="=HYPERLINK(1)") for r in SEEDS[0]])
    lines = list(csv.DictReader(io.StringIO(to_csv(compare(find([tmp_path]))))))
    assert {line["network"] for line in lines} == {"'=HYPERLINK(1)"}


def test_latex_is_a_booktabs_table_whose_text_is_text(tmp_path):
    for i, name in enumerate((r"a_b & 5 % #1 \\input{x} $y$ ~^", "[x]")):
        write(tmp_path / f"{i}.json", [replace(r, network=name) for r in SEEDS[0]])
    text = to_latex(collected(compare(find([tmp_path]))))
    body = text[text.index("\\midrule") : text.index("\\bottomrule")].splitlines()[1:-1]
    assert all(line.endswith(" \\\\") for line in body)
    columns = re.search(r"begin\{tabular\}\{([lr]+)\}", text)[1]
    assert {len(re.findall(r"(?<!\\)&", line)) + 1 for line in body} == {len(columns)}
    for line in body:
        assert "\\input" not in line
        assert not line.startswith("["), "no optional argument of the line before"
        assert not re.search(r"(?<!\\)[%#]", line)
    for word in ("toprule", "midrule", "bottomrule", "end{tabular}", "end{table}", "caption", "label"):
        assert text.count(f"\\{word}") == 1


def sweep(folder):
    arm(folder, overrides=["objective=wdat"])
    arm(folder, overrides=["objective=trades"], number=3, shift=0.01)
    return find([folder])


def test_arms_stand_below_each_other_and_the_best_is_marked(tmp_path):
    grid = collected(compare(sweep(tmp_path), filters={"delta": ["0.1"], "stage": ["after"]}))
    assert list(grid.cells) == ["arm", "clean", "PGD (CE), pointwise", "W-PGD (ReDLR), W₂", "knapsack, W₂"]
    assert grid.cells["arm"].tolist() == ["objective=wdat", "objective=trades"]
    assert grid.best == {(1, column) for column in grid.cells if column != "arm"}
    mean = 100 * (statistics.fmean(accuracies("after", "wpgd", 0.1)) + 0.02)
    assert grid.cells.iloc[1, 3].startswith(f"{mean:.2f} [")
    for constant in ("small_cnn", "digits test", "360 images", "seeds 0, 1, 2", "0.1", "linf"):
        assert constant in grid.title
    assert r"\textbf{" in to_latex(grid)


def test_many_measurements_are_rows_with_their_budgets_in_order(tmp_path):
    found = compare(sweep(tmp_path))
    grid = collected(found)
    assert list(grid.cells) == ["arm", "attack", "threat", "budget", "before", "after", "change"]
    assert list(dict.fromkeys(grid.cells["budget"])) == ["", "0.05", "0.1", "0.2"]
    assert {i % 2 for i, stage in grid.best if stage == "after"} == {1}
    assert collected(found, "wide").cells.shape == (2, 11)


def test_filters_keep_what_they_name():
    runs = find([RESULTS / "evaluate"])

    def kept(column, **filters):
        return set(compare(runs, filters=filters).figures[column])

    assert kept("attack", attack=["knapsack", "clean"]) == {"knapsack", "none"}
    assert kept("delta", delta=["2/255"]) == {0.0, 2 / 255}, "clean accuracy stays"
    assert kept("network", network=["cnn_a"]) == {"cnn_a"}
    assert kept("p", p=["inf"], attack=["pgd", "wpgd"]) == {float("inf")}
    for wrong, words in (({"attack": ["x"]}, "leaves no record; there are"), ({"colour": ["x"]}, "unknown filter"),
                         ({"delta": ["x"]}, "delta='x' is not a number")):  # fmt: skip
        with pytest.raises(SettingError, match=words):
            compare(runs, filters=wrong)


@pytest.mark.parametrize("count", sampled([1, 2, 12], 3))
def test_the_figure_has_room_for_every_arm(tmp_path, count):
    names = [f"objective=combined, attack=knapsack_budget, number={i}" for i in range(count)]
    for i, name in enumerate(names):
        arm(tmp_path, overrides=name.split(", "), number=3 * i, shift=0.001 * i)
    figure = dot_plot(compare(find([tmp_path])))
    figure.draw_without_rendering()
    (axes,) = figure.axes
    boxes = sorted((text.get_window_extent() for text in axes.get_yticklabels()), key=lambda box: -box.y0)
    assert len(boxes) == 10 * count
    assert all(upper.y0 >= lower.y1 - 2 for upper, lower in itertools.pairwise(boxes))
    assert all(box.x0 >= -1 for box in boxes)


def test_the_figure_draws_what_the_table_says():
    (axes,) = dot_plot(compare(find([RESULTS / "quickstart"]))).axes
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
