"""Losses against independent formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import log_softmax, logsumexp, rel_entr, softmax
from sklearn.metrics import log_loss
from torch.testing import assert_close

from wdat.errors import SettingError
from wdat.losses import (
    LOSSES,
    boosted_cross_entropy,
    cross_entropy,
    dlr,
    generalised_cross_entropy,
    get_label_loss,
    get_loss,
    kl_divergence,
    log_probabilities,
    margin,
    redlr,
    smoothed_cross_entropy,
)

logits = arrays(np.float64, (4, 5), elements=st.floats(-30, 30))
labels = arrays(np.int64, (4,), elements=st.integers(0, 4))


def _margin(z: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.array([max(np.delete(row, label)) - row[label] for row, label in zip(z, y, strict=True)])


def _dlr(z: np.ndarray, y: np.ndarray) -> np.ndarray:
    top = -np.sort(-z, axis=1)
    return _margin(z, y) / np.maximum(top[:, 0] - top[:, 2], 1e-12)


@given(logits, labels)
def test_cross_entropy(z, y):
    expected = -log_softmax(z, axis=1)[np.arange(4), y]
    assert_close(cross_entropy(torch.from_numpy(z), torch.from_numpy(y)).numpy(), expected, rtol=1e-9, atol=1e-12)


def test_cross_entropy_averages_to_sklearns():
    rng = np.random.default_rng(0)
    z, y = rng.normal(size=(20, 5)), rng.integers(0, 5, 20)
    mean = cross_entropy(torch.from_numpy(z), torch.from_numpy(y)).mean()
    assert float(mean) == pytest.approx(log_loss(y, softmax(z, axis=1), labels=range(5)))


@given(logits, labels, st.floats(0.01, 1))
def test_generalised_cross_entropy_and_its_gradient(z, y, q):
    """(1 − p^q)/q; its gradient is p^q times that of cross-entropy."""
    scores, target = torch.from_numpy(z).requires_grad_(True), torch.from_numpy(y)
    p = softmax(z, axis=1)[np.arange(4), y]
    value = generalised_cross_entropy(scores, target, q)
    assert_close(value.detach().numpy(), (1 - p**q) / q, rtol=1e-9, atol=1e-12)
    (ours,) = torch.autograd.grad(value.sum(), scores)
    (plain,) = torch.autograd.grad(cross_entropy(scores, target).sum(), scores)
    assert_close(ours.numpy(), (p**q)[:, None] * plain.numpy(), rtol=1e-9, atol=1e-12)


def test_generalised_cross_entropy_ends_in_cross_entropy_and_in_the_probability_of_an_error():
    z, y = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 5
    assert torch.equal(generalised_cross_entropy(z, y, 0), cross_entropy(z, y))
    assert_close(generalised_cross_entropy(z, y, 1e-6), cross_entropy(z, y), rtol=1e-5, atol=1e-6)
    assert_close(generalised_cross_entropy(z, y, 1.0), 1 - z.softmax(1).gather(1, y[:, None]).squeeze(1))
    assert_close(generalised_cross_entropy(1e4 * z, y, 0.5).max(), torch.tensor(2.0))


@given(logits, labels)
def test_boosted_cross_entropy(z, y):
    """Against sums in logarithms over all classes but the strongest wrong one."""
    value = boosted_cross_entropy(torch.from_numpy(z), torch.from_numpy(y)).numpy()
    for row, label, found in zip(z, y, value, strict=True):
        wrong = max((k for k in range(5) if k != label), key=lambda k: row[k])
        assert found == pytest.approx(logsumexp(row) - logsumexp(np.delete(row, wrong)), rel=1e-9, abs=1e-9)


def test_boosted_cross_entropy_of_a_certain_error_is_finite_with_its_gradient():
    z = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True)
    value = boosted_cross_entropy(z, torch.tensor([1]))
    (gradient,) = torch.autograd.grad(value.sum(), z)
    assert_close(value, torch.tensor([200 - math.log(2)]))
    assert_close(gradient, torch.tensor([[1.0, -0.5, -0.5]]))


@given(logits, labels)
def test_margin_and_its_sign(z, y):
    value = margin(torch.from_numpy(z), torch.from_numpy(y)).numpy()
    assert_close(value, _margin(z, y))
    top = np.sort(z, axis=1)
    clear = top[:, -1] > top[:, -2]
    assert ((value > 0) == (z.argmax(1) != y))[clear].all()


@given(logits, labels)
def test_dlr_and_redlr(z, y):
    expected = _dlr(z, y)
    assert_close(dlr(torch.from_numpy(z), torch.from_numpy(y)).numpy(), expected, rtol=1e-9, atol=1e-12)
    assert_close(redlr(torch.from_numpy(z), torch.from_numpy(y)).numpy(), np.minimum(expected, 0), rtol=1e-9, atol=0)


def test_dlr_does_not_depend_on_the_scale_of_logits():
    z, y = torch.tensor([[1.0, 3.0, 2.0, 0.0]]), torch.tensor([0])
    assert_close(dlr(100 * z, y), dlr(z, y))
    assert float(dlr(z, y)) == 1.0  # (3 − 1)/(3 − 1)


MISCLASSIFIED = [
    [1.0, 3.0, 2.0],  # plainly
    [2.0, 2.0, 0.0],  # tied for the first place
    [2.0, 2.0, 2.0],  # tied three ways: the denominator is on its floor
    [0.0, 1e-13, 0.0],  # below the floor
    [0.0, 2e-12, 1e-12],  # just above it
    [0.0, 30.0, 30.0],  # the top two tied
]


@pytest.mark.parametrize("row", MISCLASSIFIED)
def test_redlr_is_zero_with_zero_gradient_where_nothing_is_to_be_gained(row):
    z = torch.tensor([row], requires_grad=True)
    value = redlr(z, torch.tensor([0]))
    (gradient,) = torch.autograd.grad(value.sum(), z)
    assert float(value.detach()) == 0.0
    assert_close(gradient, torch.zeros(1, 3))


def test_redlr_has_dlrs_gradient_on_correct_images():
    z, y = torch.tensor([[3.0, 1.0, 2.0, -1.0]], requires_grad=True), torch.tensor([0])
    assert_close(torch.autograd.grad(redlr(z, y).sum(), z), torch.autograd.grad(dlr(z, y).sum(), z))


@pytest.mark.parametrize("loss", [dlr, redlr])
def test_dlr_needs_three_classes(loss):
    with pytest.raises(SettingError, match="three classes"):
        loss(torch.zeros(1, 2), torch.tensor([0]))


@given(logits, logits)
def test_kl_equals_scipys_relative_entropy(z, clean):
    value = kl_divergence(torch.from_numpy(z), log_probabilities(torch.from_numpy(clean)))
    expected = rel_entr(softmax(clean, axis=1), softmax(z, axis=1)).sum(1)
    assert_close(value.numpy(), expected, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kl_and_both_its_gradients_are_finite_at_extreme_logits(dtype):
    clean = torch.tensor([[2e4, -2e4, 0.0]], dtype=dtype, requires_grad=True)
    z = torch.tensor([[-2e4, 2e4, 1.0]], dtype=dtype, requires_grad=True)
    value = kl_divergence(z, log_probabilities(clean)).sum()
    assert value.dtype == torch.float32
    for gradient in torch.autograd.grad(value, (z, clean)):
        assert bool(gradient.isfinite().all())


def test_kl_and_its_gradient_are_zero_at_the_clean_prediction():
    z = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    value = kl_divergence(z, log_probabilities(z.detach()))
    (gradient,) = torch.autograd.grad(value.sum(), z)
    assert_close(value.detach(), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-15)
    assert_close(gradient, torch.zeros(3, 5, dtype=torch.float64), rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", ["ce", "margin", "dlr", "redlr"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_computed_in_float32(name, dtype):
    z = torch.tensor([[1.0, 0.5, 0.25], [0.0, 2.0, -1.0]], dtype=dtype)
    y = torch.tensor([0, 0])
    value = LOSSES[name](z, y)
    assert value.dtype == torch.float32
    assert_close(value, LOSSES[name](z.float(), y))


@given(logits, st.floats(0, 0.9))
def test_smoothed_cross_entropy_equals_torchs(z, share):
    z = torch.from_numpy(z)
    y = torch.arange(len(z)) % z.shape[1]
    wanted = F.cross_entropy(z, y, reduction="none", label_smoothing=share)
    assert_close(smoothed_cross_entropy(z, y, share), wanted, rtol=1e-9, atol=1e-9)
    each = torch.full((len(z),), share, dtype=z.dtype)
    assert_close(smoothed_cross_entropy(z, y, each), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", list(LOSSES))
def test_losses_take_no_images_at_all(name):
    target = torch.zeros(0, 4) if name == "kl" else torch.zeros(0, dtype=torch.int64)
    assert LOSSES[name](torch.zeros(0, 4), target).shape == (0,)


def test_unknown_losses_suggest_the_nearest_and_name_the_setting():
    with pytest.raises(SettingError, match=r"attack\.loss.*redlr"):
        get_loss("re-dlr")
    with pytest.raises(SettingError, match=r"losses.*margin"):
        get_label_loss("margn", "losses")


def test_kl_can_not_set_radii():
    with pytest.raises(SettingError, match=r"attack\.radii_loss=kl"):
        get_label_loss("kl", "attack.radii_loss")
