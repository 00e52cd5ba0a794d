"""CROWN's bounds: equal to an independent implementation, below every margin there is, refused where not sound."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from certify.conftest import SHAPE, image, seeded
from certify.dense import affine, crown
from sampled import sampled
from torch import nn
from torch.nn import functional as F

from wdat.certify.crown import margin_bound, relu_bounds, size
from wdat.errors import SettingError
from wdat.models import load_network
from wdat.threat import contract, direction

RADII = {"linf": (0.004, 0.02, 0.06), "l2": (0.03, 0.15, 0.4)}


def smallest_margin(network, x, label, radius, norm, steps=30, starts=4):
    """The smallest margin that PGD finds in the ball within [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand((starts, *x.shape), generator=generator, dtype=x.dtype) * 2 - 1
    noise[0] = 0
    origin, radii = x.expand(starts, *x.shape), torch.full((starts,), radius, dtype=x.dtype)
    z, least = contract(origin, origin + radius * noise, radii, norm).clamp(0, 1), np.inf
    for step in range(steps):
        z = z.detach().requires_grad_()
        logits = network(z)
        others = logits.clone()
        others[:, label] = -torch.inf
        margins = logits[:, label] - others.amax(1)
        least = min(least, float(margins.detach().min()))
        (gradient,) = torch.autograd.grad(margins.sum(), z)
        z = z - radius * (0.4 if step < 15 else 0.05) * direction(gradient, norm)
        z = contract(origin, z.detach(), radii, norm).clamp(0, 1)
    return least


def sequence(network):
    """Affine maps of `nn.Sequential` between its ReLUs, as dense matrices."""
    groups, current = [], []
    for layer in network:
        if isinstance(layer, nn.ReLU):
            groups.append(current)
            current = []
        else:
            current.append(layer)
    groups.append(current)
    shape, layers = SHAPE, []
    for group in groups:

        def run(flat, group=group, shape=shape):
            return nn.Sequential(*group)(flat.view(-1, *shape))

        count = int(np.prod(shape))
        layers.append(affine(run, count))
        with torch.no_grad():
            shape = run(torch.zeros(1, count, dtype=torch.float64)).shape[1:]
    return layers


def residual(block):
    """The same of a `Block`: what a shortcut passes by is a unit that is never negative, so its ReLU is exact."""
    shapes = (4, 3, 3)

    def part(function, shape, count):
        return affine(lambda flat: function(flat.view(-1, *shape)), count)

    first, short = part(block.first, SHAPE, 108), part(block.short, SHAPE, 108)
    second, third = part(block.second, shapes, 36), part(block.third, shapes, 36)
    one, none = np.eye(36), np.zeros((36, 36))
    # The image is in [0, 1], so it may pass a ReLU too: [relu(first x), x] → second + short, then [third z, z] → sum.
    (s, t) = first
    stem = np.vstack([s, np.eye(108)]), np.concatenate([t, np.zeros(108)])
    middle = np.hstack([second[0], short[0]]), second[1] + short[1]
    twice = third[0] + one, third[1]
    head = block.head.weight.detach().numpy(), block.head.bias.detach().numpy()
    assert none.shape == one.shape
    return [stem, middle, twice, head]


DENSE = {"mlp": sequence, "strides": sequence, "batch norm": sequence, "pooling": sequence, "residual": residual}


@pytest.mark.parametrize("norm", RADII)
@pytest.mark.parametrize("name", sorted(DENSE))
def test_equals_crown_on_dense_matrices(name, norm):
    network = seeded(name)
    layers = DENSE[name](network)
    for seed, radius in itertools.product((0, 1), RADII[norm]):
        x = image(seed)
        label = int(network(x[None]).argmax())
        bound, known = crown(layers, x.numpy().flatten(), radius, norm, label)
        assert margin_bound(network, x, label, radius, norm) == pytest.approx(bound, abs=1e-9)
        if name != "residual":
            for (low, up), (dense_low, dense_up) in zip(relu_bounds(network, x, radius, norm), known, strict=True):
                low, up = low.flatten().numpy(), up.flatten().numpy()
                unstable = (dense_low < 0) & (dense_up > 0)  # elsewhere the interval depends on how layers are cut
                assert ((low < 0) & (up > 0) == unstable).all()
                assert np.allclose(low[unstable], dense_low[unstable], atol=1e-9)
                assert np.allclose(up[unstable], dense_up[unstable], atol=1e-9)


@pytest.mark.parametrize("norm", sampled(RADII, 2))
def test_below_the_smallest_margin_that_pgd_finds(kind, norm):
    for seed in range(3):
        network, x = seeded(kind, seed), image(seed)
        label = int(network(x[None]).argmax())
        for radius in RADII[norm]:
            bound = margin_bound(network, x, label, radius, norm)
            assert bound <= smallest_margin(network, x, label, radius, norm) + 1e-9


@pytest.mark.parametrize("norm", RADII)
def test_bounds_of_relus_hold_for_sampled_images(kind, norm):
    network, x = seeded(kind, 3), image(3)
    inputs: list[torch.Tensor] = []

    class Look(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func in (F.relu, torch.relu, F.relu_, torch.relu_):
                inputs.append(args[0].detach().clone())
            return func(*args, **(kwargs or {}))

    for radius in RADII[norm]:
        known = relu_bounds(network, x, radius, norm)
        noise = torch.randn((300, *SHAPE), generator=torch.Generator().manual_seed(1), dtype=x.dtype)
        far = x + 10 * radius * (noise.sign() if norm == "linf" else noise)
        points = contract(x.expand_as(far), far, torch.full((300,), radius, dtype=x.dtype), norm).clamp(0, 1)
        inputs.clear()
        with torch.no_grad(), Look():
            network(points)
        assert len(known) == len(inputs) > 0
        for (low, up), z in zip(known, inputs, strict=True):
            assert bool(((z >= low - 1e-9) & (z <= up + 1e-9)).all())


def test_two_pixels_on_an_exhaustive_grid():
    """Never above the minimum on the grid, and equal to it where no unit is unstable."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        network = nn.Sequential(nn.Flatten(), nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))
    network = network.double()
    line = torch.linspace(0, 1, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line).view(-1, 1, 1, 2)
    with torch.no_grad():
        logits = network(grid)
    tight = 0
    for a, b in ((0.1, 0.9), (0.35, 0.5), (1.0, 0.6), (0.8, 0.05)):
        x = torch.tensor([a, b], dtype=torch.float64).view(1, 1, 2)
        label = int(network(x[None]).argmax())
        margins = logits[:, label] - logits[:, 1 - label]
        for radius, norm in itertools.product((0.01, 0.05, 0.2, 0.5), RADII):
            offset = (grid - x).flatten(1)
            length = offset.abs().amax(1) if norm == "linf" else offset.norm(dim=1)
            least = float(margins[length <= radius + 1e-12].min())
            bound = margin_bound(network, x, label, radius, norm)
            assert bound <= least + 1e-9
            unstable = any(bool(((l < 0) & (u > 0)).any()) for l, u in relu_bounds(network, x, radius, norm))  # noqa: E741
            if not unstable and norm == "linf":
                tight += 1
                assert bound == pytest.approx(least, abs=1e-9)
    assert tight >= 4


def test_a_larger_ball_has_a_smaller_bound_and_a_point_its_own_margin(kind):
    network, x = seeded(kind), image()
    logits = network(x[None])[0].detach()
    label = int(logits.argmax())
    bounds = [margin_bound(network, x, label, radius, "linf") for radius in (0.0, 0.01, 0.05, 0.2)]
    assert bounds[0] == pytest.approx(float(logits.sort().values.diff()[-1]), abs=1e-9)
    assert bounds == sorted(bounds, reverse=True)


@pytest.mark.parametrize("rows", [1, 7])
def test_rows_are_a_matter_of_memory(rows):
    network, x = seeded("strides"), image()
    whole = margin_bound(network, x, 0, 0.03, "linf")
    assert margin_bound(network, x, 0, 0.03, "linf", rows=rows) == pytest.approx(whole, abs=1e-10)


class Straight(torch.autograd.Function):
    """Its gradient isn't its own."""

    @staticmethod
    def forward(ctx, x):
        return x * 1.0

    @staticmethod
    def backward(ctx, g):
        return 3 * g


class Reversed(torch.autograd.Function):
    """Hands on what it is given, with another gradient."""

    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, g):
        return -g


class Odd(nn.Module):
    """Conv, one operation, ReLU, linear."""

    def __init__(self, operation) -> None:
        super().__init__()
        self.conv, self.head, self.operation = nn.Conv2d(3, 4, 3), nn.Linear(64, 4), operation

    def forward(self, x):
        return self.head(torch.relu(self.operation(self.conv(x))).flatten(1))


def _no_grad(z):
    with torch.no_grad():
        return z * 2


def _forgotten(z):
    """Changes a value in place, then uses the old name, as if nothing had happened to it."""
    torch.relu_(z)
    return z + 1


def _viewed(z):
    view = z.view(z.shape)
    view += 1
    return z * 2


def _buffer(z):
    buffer = torch.zeros(z.shape, dtype=z.dtype)
    buffer.add_(z)
    return buffer


REFUSED = {
    "max_pool2d": lambda z: F.max_pool2d(z, 1),
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "silu": F.silu,
    "leaky_relu": F.leaky_relu,
    "tanh": lambda z: z.tanh(),
    "softmax": lambda z: z.softmax(1),
    "where": lambda z: torch.where(torch.ones(64, dtype=torch.bool).view(1, 4, 4, 4), z, 0.0),
    "gt": lambda z: torch.where(z > 0, z, 0.0),
    "clamp": lambda z: z.clamp(min=-1),
    "abs": lambda z: z.abs(),
    "maximum": lambda z: torch.maximum(z, z * 2),
    "of two activations": lambda z: z * z,
    "two activations": lambda z: torch.mul(z, z + 1),
    "matmul": lambda z: z @ z,
    "another argument": lambda z: torch.div(torch.ones((), dtype=z.dtype), z),
    "sub": lambda z: z - (z * 2),
    "getitem": lambda z: z[:, :, :, :],
    "detach": lambda z: z.detach(),
    "data": lambda z: z.data * 2,
    "clone": lambda z: z.clone(),
    "item": lambda z: z * z.mean().item(),
    "bool": lambda z: z if bool(z.mean()) else -z,
    "pad in mode reflect": lambda z: F.pad(z, (1, 1, 1, 1), mode="reflect"),
    "batch_norm": lambda z: F.batch_norm(z, None, None, training=True),
    "changed in place": _forgotten,
    "in place": _viewed,
    "into a constant": _buffer,
    "setitem": lambda z: z.__setitem__(0, 1.0) or z,
    "float": lambda z: z.float().double(),
    "autograd function StraightBackward": lambda z: Straight.apply(z),
    "view_as": lambda z: z + Reversed.apply(z),
    "cat": lambda z: torch.cat([z, z])[:1],
    "tensor": lambda z: z * torch.tensor(z),
    "numpy": lambda z: z + torch.from_numpy(z.detach().numpy()),
    "mean with a result": lambda z: z.mean((2, 3), keepdim=True, dtype=torch.float32),
    "relu of aten": lambda z: torch.ops.aten.relu(z),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_by_name(what):
    network = Odd(REFUSED[what]).double()
    with pytest.raises(SettingError, match="certify=crown") as caught:
        margin_bound(network, image(), 0, 0.01, "linf")
    if what not in ("numpy", "tensor", "relu of aten"):
        assert what in str(caught.value)


def test_no_grad_inside_the_network_changes_nothing():
    """It would cut the graph, and with it the soundness; the pass records operations all the same."""
    network = Odd(lambda z: z * 2).double()
    quiet = Odd(_no_grad).double()
    quiet.load_state_dict(network.state_dict())
    assert margin_bound(quiet, image(), 0, 0.05, "linf") == margin_bound(network, image(), 0, 0.05, "linf")


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_a_scripted_part_is_refused():
    class Square(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * x

    scripted = torch.jit.script(Square())
    for operation in (scripted, lambda z: z + scripted(z)):
        with pytest.raises(SettingError, match="certify=crown"):
            margin_bound(Odd(operation).double(), image(), 0, 0.01, "linf")


def test_logits_must_come_from_the_image():
    class Constant(nn.Module):
        def forward(self, x):
            return torch.zeros(len(x), 4, dtype=x.dtype)

    with pytest.raises(SettingError, match="certify=crown"):
        margin_bound(Constant(), image(), 0, 0.01, "linf")


@pytest.mark.parametrize("layer", [0, 2, 4])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_arent_finite_prove_nothing(bad, layer):
    """Whatever the label: the class with an infinite logit included."""
    network = seeded("mlp")
    with torch.no_grad():
        list(network.parameters())[layer][0] = bad
    for label in range(4):
        value = margin_bound(network, image(), label, 0.01, "linf")
        assert not (value > 0 and np.isfinite(value)) or bool(network(image()[None]).isfinite().all())


def test_the_network_is_left_as_it_was():
    network, x = seeded("batch norm"), image()
    network.train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    margin_bound(network, x, 0, 0.02, "linf")
    assert network.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    with torch.inference_mode():
        assert margin_bound(network, x, 0, 0.02, "linf") == margin_bound(network, x, 0, 0.02, "linf")


def test_size():
    found = size(seeded("residual"), image())
    assert found.units == 36 + 36 + 36
    assert found.gigabytes == pytest.approx(36 * 108 * 8 / 1e9)


def test_local_networks():
    x = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert size(load_network("resnet4b"), x).units == 16 * 256 + 4 * 32 * 64 + 4 * 32 * 16 + 100
    assert size(load_network("small_cnn"), x).units == 16 * 256 + 32 * 64 + 32 * 16 + 64


def test_a_wide_residual_network_is_too_large():
    """65,536 units in its first layer, each a function of 3,072 pixels in float64."""
    x = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert size(load_network("preact_resnet18"), x).gigabytes == pytest.approx(65_536 * 3_072 * 8 / 1e9)


@pytest.mark.parametrize(
    ("name", "file", "values"),
    [
        ("cnn_a", "cnn_a_adv.pt", (0.02810, 2.70595, 0.98322, 0.85646)),
        ("resnet2b", "resnet2b.pt", (-0.25065, 1.93754, 1.37919, 1.02284)),
    ],
)
def test_real_networks(name, file, values, shared):
    """At 0.5/255 on the first test images; an implementation that agrees with auto_LiRPA's CROWN gave the values."""
    network = load_network(name, checkpoint=shared / "models" / file)
    with np.load(shared / "data" / "cifar10_subset.npz") as arrays:
        x = torch.from_numpy(arrays["x_test"][:4]).permute(0, 3, 1, 2).float() / 255
        y = arrays["y_test"][:4].tolist()
    found = [margin_bound(network, x[i], y[i], 0.5 / 255, "linf") for i in range(4)]
    assert found == pytest.approx(values, abs=1e-3)
