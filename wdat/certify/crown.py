"""Backward CROWN: a certified lower bound of a ReLU network's margin on a ball around one image.

Source: Zhang et al. 2018, *Efficient neural network robustness certification with general activation functions*,
arXiv 1811.00866. Of the lower lines it takes the one nearer to the ReLU, as that paper does.

**Derivation.** On a ball around the image x₀ let every input z_j of a ReLU lie in [l_j, u_j]. Where l_j ≥ 0 the ReLU is
the identity, where u_j ≤ 0 it is zero, and where l_j < 0 < u_j

    α_j z_j  ≤  relu(z_j)  ≤  s_j (z_j − l_j),    s_j = u_j / (u_j − l_j),  any α_j in [0, 1].

Let the quantity to bound be Σ_j g_j relu(z_j) plus terms that don't depend on this layer. Its lower bound takes the
left function where g_j ≥ 0 and the right one where g_j < 0:

    Σ_j (g_j α_j + g_j⁻ (s_j − α_j)) z_j − Σ_j g_j⁻ s_j l_j,    g⁻ = min(g, 0).

So a *backward pass* whose ReLUs multiply the incoming gradient by α_j where it is positive and by s_j where it is
negative carries the quantity's lower-bounding linear function to the input, through any layers that are linear
between the ReLUs, while the constants add up. They ride on a scalar input, `slack`, whose gradient collects them. With
a the gradient at the image and c the sum of constants, each taken relative to the value at x₀,

    quantity(x)  ≥  quantity(x₀) + c + min over x in the ball of ⟨a, x − x₀⟩.

The minimum is explicit: pixel by pixel on the linf ball within [0, 1]; on the l2 ball −r ‖a‖₂, or the bound of the
surrounding box within [0, 1] if that is larger. The l_j and u_j of a layer are lower bounds of ±z_j, found in the same
way once the layers before it have theirs; interval arithmetic finds the units that need no pass.

**Soundness.** The argument holds if everything between the ReLUs is an affine map whose gradient autograd knows. The
forward pass therefore runs under a mode that sees every operation on a tensor that depends on the image, and knows
those of `_AFFINE` and ReLU alone; any other is refused by name. So are operations that would slip past the mode:
autograd functions written in Python and scripted modules. A value changed in place is replaced by a new one, and any
later use of the old one, or of a view of it, is refused. All of this is up to floating-point rounding, which the caller
covers by a margin.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from wdat.errors import SettingError
from wdat.gradients import undisturbed
from wdat.precision import float32

ROWS = 1024  # linear functions that travel back at once

_RELU = {F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}
_WEIGHTED = {F.linear, F.conv1d, F.conv2d, F.conv3d}
_VIEWS = {torch.flatten, Tensor.flatten, torch.reshape, Tensor.reshape, Tensor.view, Tensor.contiguous}
_AVERAGES = {
    torch.mean, Tensor.mean, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d,
    F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d,
}  # fmt: skip
_ADD = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__}
_SUBTRACT = {torch.sub, Tensor.sub, Tensor.__sub__}
_MULTIPLY = {torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__}
_DIVIDE = {torch.div, Tensor.div, Tensor.__truediv__}
_IN_PLACE: dict[Any, Callable[..., Any]] = {
    Tensor.add_: torch.add, Tensor.__iadd__: torch.add, Tensor.sub_: torch.sub, Tensor.__isub__: torch.sub,
    Tensor.mul_: torch.mul, Tensor.__imul__: torch.mul, Tensor.div_: torch.div, Tensor.__itruediv__: torch.div,
}  # fmt: skip
_AFFINE = _WEIGHTED | _VIEWS | _AVERAGES | _ADD | _SUBTRACT | _MULTIPLY | _DIVIDE | {F.batch_norm, F.pad}
_LOOKS = {  # questions whose answers don't depend on the values
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.stride, Tensor.is_contiguous, Tensor.__len__,
    Tensor.is_floating_point, Tensor.is_complex, Tensor.get_device,
    *(getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "layout", "requires_grad",
                                                  "is_cuda", "is_cpu", "is_sparse", "is_quantized")),
}  # fmt: skip


@dataclass
class _Memory:
    """What tensors that may share memory have in common: whether the network has changed it in place."""

    overwritten: bool = False


@dataclass(frozen=True)
class _Box:
    """Interval bounds center ± radius of a tensor, and the memory that it may share."""

    center: Tensor
    radius: Tensor
    memory: _Memory = field(default_factory=_Memory)


@dataclass
class _Relaxation:
    """Bounds of the inputs of one ReLU, and the slope α of the lower line where it is unstable; all (1, ...)."""

    low: Tensor
    up: Tensor
    alpha: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.alpha = (self.up > -self.low).to(self.up.dtype)  # the line nearer to the ReLU

    def slopes(self) -> tuple[Tensor, Tensor]:
        """Slope of the lower and of the upper line, 1 where the unit is active, 0 where it is inactive."""
        active, inactive = (self.low >= 0).to(self.low.dtype), self.up <= 0
        unstable = ~(inactive | (self.low >= 0))
        chord = torch.where(unstable, self.up / (self.up - self.low), active)
        return torch.where(unstable, self.alpha, active), chord


class _RelaxedReLU(torch.autograd.Function):
    """ReLU whose backward pass carries lower-bounding linear functions, as the module's derivation has it."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, slack: Tensor, relaxation: _Relaxation) -> Tensor:
        ctx.save_for_backward(z)
        ctx.relaxation = relaxation
        return z.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
        z = ctx.saved_tensors[0].detach()
        low = ctx.relaxation.low
        lower, upper = ctx.relaxation.slopes()
        negative = g.clamp(max=0)
        at_lower = lower * z - z.clamp(min=0)  # the lower line at the image, relative to the ReLU
        between = (upper - lower) * z - torch.where((low < 0) & (upper > 0), upper * low, 0.0)
        constants = (g * at_lower + negative * between).flatten(1).sum(1)
        return g * lower + negative * (upper - lower), constants, None


class _CrownPass(TorchFunctionMode):
    """One forward pass of a network on one image, in which each ReLU is bounded on the ball, then relaxed.

    Args:
        image: (1, ...), in [0, 1].
        radius: Of the ball, in pixel units.
        norm: Ground norm.
        rows: Linear functions that travel back at once.
    """

    def __init__(self, image: Tensor, radius: float, norm: str, rows: int) -> None:
        super().__init__()
        self.image = image.detach().clone().requires_grad_()
        self.slack = image.new_zeros(1).requires_grad_()
        self.radius, self.norm, self.rows = radius, norm, rows
        self.low, self.up = ((image.detach() + step).clamp(0, 1) for step in (-radius, radius))
        self.relaxations: list[_Relaxation] = []
        self.boxes = WeakIdKeyDictionary()
        self.boxes[self.image] = _Box((self.up + self.low) / 2, (self.up - self.low) / 2)
        self.mixed = 0  # maps of the image so far in which an output depends on several inputs

    def run(self, network: nn.Module) -> Tensor:
        """Logits (1, K), with the graph that carries linear functions back."""
        with self:
            logits = network(self.image)
        if not isinstance(logits, Tensor) or logits not in self.boxes or logits.dim() != 2:
            raise SettingError("certify=crown: the network must make logits (N, K) of images by operations it knows")
        for node in _nodes(logits):
            if getattr(node, "_forward_cls", _RelaxedReLU) is not _RelaxedReLU:
                raise _refused(f"the autograd function {type(node).__name__}")
        return logits

    def lower(self, z: Tensor, rows: Tensor) -> Tensor:
        """Lower bounds (R,) of the linear functions `rows` (R, 1, ...) of the activations z (1, ...) on the ball."""

        def back(row: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(z, (self.image, self.slack), row, retain_graph=True, materialize_grads=True)

        found = []
        for part in torch.split(rows, self.rows):
            a, constants = torch.vmap(back)(part)
            ends = a.clamp(min=0) * (self.low - self.image) + a.clamp(max=0) * (self.up - self.image)
            least = ends.flatten(1).sum(1)
            if self.norm == "l2":
                least = torch.maximum(least, -self.radius * torch.linalg.vector_norm(a.flatten(1), dim=1))
            found.append((part * z.detach()).flatten(1).sum(1) + constants.flatten() + least)
        return torch.cat(found).detach()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and bound what it gives; refuse those whose bounds aren't known."""
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        known = [tensor for tensor in tensors if tensor in self.boxes]
        if not known or func in _LOOKS:
            return func(*args, **kwargs)
        name = resolve_name(func) or getattr(func, "__name__", str(func))
        if any(self.boxes[tensor].memory.overwritten for tensor in known):
            raise _refused(f"{name} of a value that was changed in place before")
        if any(tensor.requires_grad for tensor in tensors if tensor not in self.boxes):
            raise _refused(f"{name} of a value made by an operation that can't be followed")
        overwrites = func in _IN_PLACE or func in (torch.relu_, Tensor.relu_, F.relu_)
        if overwrites and known[0] is not args[0]:
            raise _refused(f"{name} into a constant")
        before = self.boxes[known[0]]
        with torch.enable_grad():
            if func in _RELU:
                overwrites |= bool(kwargs.get("inplace", args[1] if len(args) > 1 else False))
                out, box = self._relu(known[0])
            else:
                func = _IN_PLACE.get(func, func)
                box = self._rule(func, name, args, kwargs, known)
                out = func(*args, **kwargs)
        if not isinstance(out, Tensor) or out.dtype != self.image.dtype or not out.requires_grad:
            raise _refused(f"{name} with a result that has no gradient or another precision")
        before.memory.overwritten |= overwrites
        self.boxes[out] = box
        return out

    def _rule(
        self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any], known: list[Tensor]
    ) -> _Box:
        """Interval bounds of what one affine operation gives.

        Raises:
            SettingError: If it isn't on the list, or isn't affine in this use.
        """
        if func not in _AFFINE:
            raise _refused(name)
        box = self.boxes[known[0]]
        with torch.no_grad():
            self.mixed += func in _WEIGHTED | _AVERAGES
            if func in _ADD and len(known) == 2 and not kwargs:
                self.mixed += 2
                other = self.boxes[known[1]]
                return _Box(func(box.center, other.center), func(box.radius, other.radius))
            commutes = func in _ADD | _MULTIPLY
            first = bool(args) and known[0] is args[0]
            if len(known) > 1 or not (commutes or first):
                raise _refused(f"{name} of two activations, or with an activation in another argument than the first")
            rest = args[1:] if first else args[:1]
            if func in _WEIGHTED:
                given = dict(zip(("weight", "bias"), rest, strict=False)) | kwargs
                weight, more = given.pop("weight"), rest[2:]
                bias = given.pop("bias", None)
                center = func(box.center, weight, bias, *more, **given)
                return _Box(center, func(box.radius, weight.abs(), None, *more, **given))
            if func in _VIEWS | _AVERAGES:
                center, radius = (func(part, *rest, **kwargs) for part in (box.center, box.radius))
                return _Box(center, radius.abs(), box.memory)
            if func is F.pad:
                given = inspect.signature(F.pad).bind(*args, **kwargs).arguments
                if given.get("mode", "constant") != "constant":
                    raise _refused(f"pad in mode {given['mode']}")
                return _Box(F.pad(box.center, given["pad"], value=given.get("value")), F.pad(box.radius, given["pad"]))
            if func is F.batch_norm:
                if inspect.signature(F.batch_norm).bind(*args, **kwargs).arguments.get("training", False):
                    raise _refused("batch_norm with the statistics of the batch")
                center, one, zero = (
                    func(part, *rest, **kwargs)
                    for part in (box.center, torch.ones_like(box.center), torch.zeros_like(box.center))
                )
                return _Box(center, (one - zero).abs() * box.radius)
            if kwargs or len(rest) != 1:
                raise _refused(name)
            center = func(box.center, *rest)
            if func in _ADD | _SUBTRACT:
                return _Box(center, box.radius.expand_as(center))
            return _Box(center, func(box.radius, *rest).abs())

    def _relu(self, z: Tensor) -> tuple[Tensor, _Box]:
        relaxation = _Relaxation(*self._bounds(z))
        self.relaxations.append(relaxation)
        out: Tensor = _RelaxedReLU.apply(z, self.slack, relaxation)
        low, up = relaxation.low.clamp(min=0), relaxation.up.clamp(min=0)
        return out, _Box((up + low) / 2, (up - low) / 2)

    def _bounds(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Bounds of the inputs z (1, ...) of a ReLU: of each unit first the one that may show it to be stable."""
        box = self.boxes[z]
        low, up = box.center - box.radius, box.center + box.radius
        if self.norm == "linf" and not self.relaxations and self.mixed < 2:
            return low, up  # of a box under one linear layer the interval is exact
        shape, value = z.shape, z.detach().flatten()
        low, up = low.flatten(), up.flatten()
        for positive in (True, False):
            for sign in (1, -1):
                side = (value >= 0) == (positive == (sign > 0))
                at = ((low < 0) & (up > 0) & side).nonzero().squeeze(1)
                if not len(at):
                    continue
                rows = z.new_zeros(len(at), len(value))
                rows[torch.arange(len(at), device=at.device), at] = float(sign)
                bound = self.lower(z, rows.view(-1, *shape))
                if sign > 0:
                    low = low.index_copy(0, at, torch.maximum(low[at], bound))
                else:
                    up = up.index_copy(0, at, torch.minimum(up[at], -bound))
        return low.view(shape), up.view(shape)


def _refused(what: str) -> SettingError:
    return SettingError(
        f"certify=crown can't bound this network: it uses {what}. CROWN knows convolutions, linear layers, sums, "
        "padding, flattening, average pooling, BatchNorm in eval mode, arithmetic with constants and ReLU; use "
        "certify=smoothing"
    )


def _nodes(z: Tensor) -> Iterator[Any]:
    """The nodes of the graph that made a tensor."""
    stack, seen = [z.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            stack.extend(before for before, _ in node.next_functions)


def _margins(classes: int, label: int, like: Tensor) -> Tensor:
    """The rows e_label − e_j of all j ≠ label, (K − 1, 1, K)."""
    one = torch.eye(classes, dtype=like.dtype, device=like.device)
    others = [j for j in range(classes) if j != label]
    return (one[label] - one[others]).unsqueeze(1)


def margin_bound(network: nn.Module, image: Tensor, label: int, radius: float, norm: str, rows: int = ROWS) -> float:
    """A lower bound of min over the ball of z_label − max over j ≠ label of z_j, up to floating-point rounding.

    Args:
        network: Takes images in [0, 1], gives logits (N, K); its weights have the precision of the image. Called in
            eval mode and left as it was found.
        image: (C, H, W), in [0, 1].
        label: The class whose margin is bounded.
        radius: Of the ball within [0, 1], in pixel units.
        norm: Ground norm, `linf` or `l2`.
        rows: Linear functions that travel back at once, a matter of memory.

    Returns:
        The bound; NaN where the network's values are.

    Raises:
        SettingError: If the network uses an operation that isn't known to be affine or a ReLU.
    """
    with undisturbed(network), float32(network, image):
        crown = _CrownPass(image.unsqueeze(0), radius, norm, rows)
        logits = crown.run(network)
        return float(crown.lower(logits, _margins(logits.shape[1], label, image)).min())


def relu_bounds(
    network: nn.Module, image: Tensor, radius: float, norm: str, rows: int = ROWS
) -> list[tuple[Tensor, Tensor]]:
    """Lower and upper bounds (1, ...) of the inputs of each ReLU on the ball, in the order of the forward pass."""
    with undisturbed(network), float32(network, image):
        crown = _CrownPass(image.unsqueeze(0), radius, norm, rows)
        crown.run(network)
    return [(r.low, r.up) for r in crown.relaxations]


@dataclass(frozen=True)
class Size:
    """What CROWN costs on a network.

    Attributes:
        units: ReLU units, each of which may need two backward passes.
        gigabytes: Memory of the linear bounds of the widest layer, of one image in float64.
    """

    units: int
    gigabytes: float


def size(network: nn.Module, image: Tensor) -> Size:
    """What CROWN would cost on an image (C, H, W), from one forward pass.

    Raises:
        SettingError: If the network uses an operation that isn't known to be affine or a ReLU.
    """
    layers = [low.numel() for low, _ in relu_bounds(network, image, 0.0, "linf")]
    return Size(sum(layers), max(layers, default=0) * image.numel() * 8 / 1e9)
