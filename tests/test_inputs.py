"""What the Python API takes where the meaning is plain, and the one line that it says where it isn't."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import wdat
from wdat.attacks import build
from wdat.data import ImageDataModule
from wdat.errors import SettingError
from wdat.inputs import check_figures, classes_of
from wdat.threat import ThreatModel

THREAT = ThreatModel(2, "linf", 0.05)
SHORT = {"wpgd": {"steps": 3, "step_size": 0.4}}


def problem():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(48, 4))
        return network, torch.rand(10, 3, 4, 4), torch.arange(10) % 4


NETWORK, X, Y = problem()


class Pairs(Dataset):
    """One image and its label at a time."""

    def __len__(self):
        return len(X)

    def __getitem__(self, k):
        return X[k], int(Y[k])


LOADERS = {
    "dicts": [{"image": X[:6], "label": Y[:6]}, {"image": X[6:], "label": Y[6:]}],
    "dicts of another data set": [{"pixel_values": X, "labels": Y, "id": list(range(10))}],
    "one dict": {"x": X, "y": Y},
    "numpy": [(X.numpy(), Y.numpy())],
    "numpy in double precision": [(X.double().numpy(), Y.numpy().astype(np.int16))],
    "int32": [(X, Y.int())],
    "lists of labels": [(X, Y.tolist())],
    "a data set": TensorDataset(X, Y),
    "a data set of one's own": Pairs(),
    "a loader": DataLoader(Pairs(), 3),
    "the pair": (X, Y),
    "lists for tuples": [[X, Y]],
    "an iterator": iter([(X[:5], Y[:5]), (X[5:], Y[5:])]),
}


@pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS)
def test_every_loader_of_plain_meaning_gives_the_same_records(loader):
    known = wdat.evaluate(NETWORK, [(X, Y)], THREAT, ["wpgd"], options=SHORT)
    for a, b in zip(known, wdat.evaluate(NETWORK, loader, THREAT, ["wpgd"], options=SHORT), strict=True):
        assert (a.n, a.accuracy, a.distance) == (b.n, b.accuracy, b.distance)
        assert b.loss_mean == pytest.approx(a.loss_mean, rel=1e-6)


def test_splits_of_the_data_module_are_data_sets_too():
    data = ImageDataModule("digits", 10, limit_test=12)
    data.setup("test")
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    a, b = (wdat.evaluate(network, given, THREAT, [])[0] for given in (data.test_dataloader(), data.images("test")))
    assert (a.n, a.loss_mean) == (b.n, b.loss_mean)


@pytest.mark.parametrize("attacks", ["wpgd", ("wpgd",), build("wpgd", **SHORT["wpgd"])])
@pytest.mark.parametrize("losses", ["ce", ["ce"]])
def test_one_attack_or_loss_is_as_good_as_a_list(attacks, losses):
    records = wdat.evaluate(NETWORK, (X, Y), THREAT, attacks, losses=losses, options=SHORT)
    assert [(r.attack, r.loss) for r in records] == [("none", "ce"), ("wpgd", "ce")]


@pytest.mark.parametrize(
    "network", [lambda x: NETWORK(x), NETWORK.forward, NETWORK.__call__], ids=["function", "forward", "call"]
)
def test_a_function_is_as_good_as_a_module(network):
    a, b = (wdat.attack(n, X, Y, THREAT, **SHORT["wpgd"]) for n in (NETWORK, network))
    assert torch.equal(a.x_adv, b.x_adv)
    records = [wdat.evaluate(n, (X, Y), THREAT, "wpgd", options=SHORT) for n in (NETWORK, network)]
    assert [r.accuracy for r in records[0]] == [r.accuracy for r in records[1]]
    assert all(p.requires_grad and p.grad is None for p in NETWORK.parameters())


@pytest.mark.parametrize(
    ("x", "y"),
    [(X.numpy(), Y.numpy()), (X.double().numpy(), Y.int()), (X, Y.tolist()), (X.numpy()[:, ::-1][:, ::-1], Y.byte())],
)
def test_arrays_are_attacked_like_tensors(x, y):
    known = wdat.attack(NETWORK, X, Y, THREAT, **SHORT["wpgd"])
    assert torch.equal(wdat.attack(NETWORK, x, y, THREAT, **SHORT["wpgd"]).x_adv, known.x_adv)


# --- one line each


class Both(NamedTuple):
    logits: Tensor
    features: Tensor


class Gives(nn.Module):
    """A network with an output of another form."""

    def __init__(self, form):
        super().__init__()
        self.inner, self.form = NETWORK, form

    def forward(self, x):
        return self.form(self.inner(x), x)


FORMS = {
    "tuple": (lambda z, x: (z, x), "a tuple of 2, not logits"),
    "list": (lambda z, x: [z], "a list of 1, not logits"),
    "named": (lambda z, x: Both(z, x), "a Both of logits, features, not logits"),
    "dict": (lambda z, x: {"logits": z, "aux": x}, "a dict of logits, aux, not logits"),
    "other dict": (lambda z, x: {"out": z}, "a dict of out, not logits"),
    "one logit": (lambda z, x: z[:, :1], "one logit"),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_wrapper_that_is_named_works(form):
    """It is run as it stands in the message."""
    network = Gives(FORMS[form][0])
    y = Y % 2
    with pytest.raises(SettingError) as caught:
        wdat.attack(network, X, y, THREAT)
    with pytest.raises(SettingError) as again:
        wdat.evaluate(network, (X, y), THREAT, [])
    text = str(caught.value)
    assert str(again.value) == text
    assert FORMS[form][1] in text
    assert "\n" not in text
    scope = {"torch": torch}
    exec(text[text.index("class Logits") : text.index(" (and give")], scope)
    assert classes_of(scope["Logits"](network), X) == (2 if form == "one logit" else 4)
    wdat.evaluate(scope["Logits"](network), (X, y), THREAT, "wpgd", options=SHORT)


@pytest.mark.parametrize(
    ("form", "words"),
    [
        (lambda z, x: z.argmax(1), r"tensor \(1,\) of int64 .*softmax"),
        (lambda z, x: z[:, :, None], r"tensor \(1, 4, 1\) of float32"),
        (lambda z, x: z.mean(), r"tensor \(\) of float32"),
        (lambda z, x: None, "NoneType"),
        (lambda z, x: z.detach(), "carry no gradient to the images"),
        (lambda z, x: torch.from_numpy(z.detach().numpy()), "carry no gradient"),
    ],
)
def test_what_gives_no_logits_or_no_gradient_is_told_so(form, words):
    for use in (lambda n: wdat.attack(n, X, Y, THREAT), lambda n: wdat.evaluate(n, (X, Y), THREAT, [])):
        with pytest.raises(SettingError, match=words):
            use(Gives(form))


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(4))

    def forward(self, x):
        return self.layers(x)


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_lazy_layers_want_one_image_first():
    network = Lazy()
    with pytest.raises(SettingError, match=r"Lazy has lazy layers .* network\(torch\.zeros\(1, 3, 4, 4\)\) once"):
        wdat.attack(network, X, Y, THREAT)
    network(torch.zeros(2, 3, 4, 4))
    wdat.attack(network, X, Y, THREAT, **SHORT["wpgd"])


@pytest.mark.parametrize(
    ("network", "x", "words"),
    [
        (NETWORK, torch.rand(4, 3, 5, 5), r"can't take images \(1, 3, 5, 5\) of float32.*shapes cannot be multiplied"),
        (nn.Conv2d(3, 4, 3), torch.rand(4, 8, 8, 3), r"channels come first: x\.permute\(0, 3, 1, 2\)"),
        (NETWORK, X.double(), r"of float64 on cpu \(.*[dD]ouble"),
        (nn.Linear, X, r"the class Linear: give an instance"),
        ("resnet", X, "the network is a str"),
        (NETWORK, X.tolist(), "not a list"),
        (NETWORK, np.array(["a"]), "an array of <U1"),
        (NETWORK, (255 * X).numpy().astype(np.uint8), "images must be a float tensor"),
    ],
)
def test_networks_and_images_that_do_not_fit(network, x, words):
    with pytest.raises(SettingError, match=words) as caught:
        wdat.attack(network, x, Y[: len(x)], THREAT)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("y", "words"),
    [
        (Y.float(), r"not torch\.float32: give y\.long\(\)"),
        (nn.functional.one_hot(Y).float(), r"y\.argmax\(1\)"),
        (Y > 1, r"torch\.bool"),
        (["cat"] * 10, "labels must be whole numbers"),
        (None, "labels must be whole numbers"),
        (Y[:, None], "labels must be int64 of shape"),
    ],
)
def test_labels_that_are_no_classes(y, words):
    with pytest.raises(SettingError, match=words):
        wdat.attack(NETWORK, X, y, THREAT)
    with pytest.raises(SettingError, match=words):
        wdat.evaluate(NETWORK, [(X, y)], THREAT, [])


def test_one_image_is_no_batch():
    for use in (
        lambda y: wdat.attack(NETWORK, X[0], y, THREAT),
        lambda y: wdat.evaluate(NETWORK, [(X[0], y)], THREAT, []),
        lambda y: wdat.nearest_adversarial(NETWORK, X[0], y),
    ):
        with pytest.raises(SettingError, match=r"of one image, give x\[None\] and y\[None\]"):
            use(Y[0])
    with pytest.raises(SettingError, match=r"if x is one image \(C, H, W\), give x\[None\]"):
        wdat.attack(NETWORK, X[0], Y[:1], THREAT)


class Pictures(Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, k):
        from PIL import Image

        return Image.new("RGB", (4, 4)), 0


@pytest.mark.parametrize(
    ("loader", "words"),
    [
        (Pictures(), r"items of Pictures can't be put into batches.*ToTensor\(\)"),
        (
            [{"picture": X, "label": Y}],
            "a batch has picture, label, of which none is called image, .*: name its images",
        ),
        ([{"image": X}], "name its labels"),
        ([X], "a batch is a Tensor"),
        ([(X,)], "a batch is a tuple, not images and labels"),
        (X, "the loader is a Tensor"),
        (X.numpy(), "the loader is a ndarray"),
        (3, "the loader is a int"),
        ("test", "the loader is a str"),
        (ImageDataModule("digits", 10), r"the loader is a ImageDataModule: .*data\.test_dataloader\(\)"),
    ],
)
def test_loaders_without_images_and_labels(loader, words):
    with pytest.raises(SettingError, match=words):
        wdat.evaluate(NETWORK, loader, THREAT, [])


@pytest.mark.parametrize("threat", [8 / 255, "w2_linf", None, {"p": 2}])
def test_a_threat_is_asked_for(threat):
    for use in (lambda: wdat.attack(NETWORK, X, Y, threat), lambda: wdat.evaluate(NETWORK, (X, Y), threat)):
        with pytest.raises(SettingError, match=r"wdat\.ThreatModel\(p=2"):
            use()


@pytest.mark.parametrize("attacks", [None, [], ()])
def test_no_attack_leaves_the_clean_record(attacks):
    assert [r.attack for r in wdat.evaluate(NETWORK, (X, Y), THREAT, attacks)] == ["none"]


@pytest.mark.parametrize(
    ("use", "words"),
    [
        (
            lambda: wdat.evaluate(NETWORK, (X, Y), THREAT, [wdat.attacks.WPGD]),
            r"attacks has WPGD, .*give WPGD\(\.\.\.\)",
        ),
        (lambda: wdat.evaluate(NETWORK, (X, Y), THREAT, wdat.attacks.WPGD), "attacks has WPGD"),
        (lambda: wdat.evaluate(NETWORK, [(X, Y), (torch.rand(2, 3, 5, 5), Y[:2])], THREAT, []), "3×4×4, 3×5×5"),
        (lambda: wdat.attack(NETWORK, X, Y, THREAT, steps="5"), r"attack\.steps='5' must be a whole number"),
        (lambda: wdat.evaluate(NETWORK, (X, Y), THREAT, "wpgd", options={"wpgd": {"steps": "5"}}), r"wpgd\.steps='5'"),
    ],
)
def test_what_can_not_be_meant_is_one_line(use, words):
    with pytest.raises(SettingError, match=words) as caught:
        use()
    assert "\n" not in str(caught.value)


class Noisy(nn.Sequential):
    def forward(self, x):
        return super().forward(x + 0.1 * torch.rand_like(x))


class OfItsBatch(nn.Sequential):
    def forward(self, x):
        return super().forward(x - x.mean(0))


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (Noisy(*NETWORK), "Noisy gives other logits for the same images at each pass"),
        (OfItsBatch(*NETWORK), "OfItsBatch gives logits that depend on the other images of the batch"),
        (nn.Sequential(*NETWORK, nn.Softmax(1)), "Sequential gives probabilities, not logits"),
        (nn.Sequential(*NETWORK, nn.Softmax(1), nn.Dropout(0.5)), "gives probabilities"),  # Dropout is off
        (lambda x: Noisy(*NETWORK)(x), "<lambda> gives other logits"),
    ],
)
def test_a_network_whose_figures_mean_little_is_told(network, words):
    with pytest.warns(UserWarning, match=words):
        wdat.evaluate(network, [(X, Y)], THREAT, [])


@pytest.mark.parametrize("network", [NETWORK, nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(), *NETWORK)])
@pytest.mark.parametrize("images", [X, X[:1], X[:0], 1e-30 * X])
def test_a_network_that_is_a_function_of_each_image_is_not_doubted(network, images):
    if len(images):
        check_figures(network.train(), images)
    assert network.training


def test_logits_that_are_not_finite_are_the_same_each_time():
    check_figures(nn.Sequential(*NETWORK, nn.LogSigmoid(), nn.Threshold(0, math.nan)), X)
