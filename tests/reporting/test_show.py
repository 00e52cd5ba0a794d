"""What an interpreter and a notebook show of an evaluation."""

from __future__ import annotations

from dataclasses import replace

import matplotlib.pyplot as plt
import pytest
import torch
from torch import nn

import wdat
from wdat import records
from wdat.errors import SettingError


@pytest.fixture(scope="module")
def results():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    x = torch.rand(30, 3, 2, 2)
    loader = [(x, network(x).argmax(1))]
    threat = wdat.ThreatModel(2, "linf", "8/255")
    options = {"pgd": {"steps": 2}, "knapsack": {"effort": "quick"}}
    return wdat.evaluate(network, loader, threat, ["pgd", "knapsack"], options=options)


def test_they_are_a_list(results):
    assert isinstance(results, list)
    assert [r.attack for r in results] == ["none", "pgd", "knapsack"]


def test_they_print_as_a_table(results):
    lines = repr(results).splitlines()
    for name, record in (("PGD (CE)", results[1]), ("knapsack ≤", results[2])):
        (line,) = [line for line in lines if line.strip().startswith(name)]
        assert f" {100 * record.accuracy:.2f} " in line
    assert "\x1b" not in repr(results)
    assert repr(type(results)()) == "[]"


def test_notebooks_show_a_table_in_which_text_is_text(results):
    page = type(results)([*results, replace(results[1], attack="<b>own")])._repr_html_()
    assert page.count("<tr") == 5
    assert "PGD (CE)" in page
    assert "<b>" not in page


def test_frame_and_file(results, tmp_path):
    assert list(results.to_frame()["accuracy"]) == [r.accuracy for r in results]
    file = tmp_path / "records.json"
    records.write(file, results)
    assert repr(wdat.load_records(file)) == repr(results)


def test_a_figure_of_ones_own(results):
    figure, axes = plt.subplots(1, 2)
    assert results.plot(axes[1]) is axes[1]
    assert axes[1].get_legend() is not None
    assert not axes[0].has_data()
    plt.close(figure)


def test_a_new_figure(results):
    axes = results.plot()
    assert "budget δ in 1/255" in axes.get_xlabel()
    assert plt.fignum_exists(axes.figure.number)
    plt.close(axes.figure)


def test_clean_records_alone_have_no_curve(results):
    with pytest.raises(SettingError, match="no record is of an attack"):
        type(results)(results[:1]).plot()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_nearest_points_of_a_linear_network(norm):
    """Of two classes, |difference of logits| over the dual norm of the difference of weights."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).double()
    x = 0.5 + 0.01 * torch.randn(20, 3, 2, 2).double()
    network[1].bias.data -= network(x).detach().mean(0)  # both classes occur, and the boundary is inside of [0, 1]
    logits = network(x).detach()
    w = (network[1].weight[0] - network[1].weight[1]).detach()
    exact = (logits[:, 0] - logits[:, 1]).abs() / w.norm(p=1 if norm == "linf" else 2)
    found = wdat.nearest_adversarial(network, x, logits.argmax(1), norm, effort="quick")
    assert (network(found.x_adv).argmax(1) != logits.argmax(1)).all()
    assert (found.distances >= exact * (1 - 1e-6)).all()
    torch.testing.assert_close(found.distances.double(), exact, rtol=0.02, atol=1e-5)
    wrong = wdat.nearest_adversarial(network, x, 1 - logits.argmax(1), norm, effort="quick")
    assert (wrong.distances == 0).all()


def test_an_unknown_option_of_the_search_is_refused():
    with pytest.raises(SettingError, match="efort"):
        wdat.nearest_adversarial(nn.Flatten(), torch.rand(1, 1, 2, 2), torch.tensor([0]), efort="quick")
