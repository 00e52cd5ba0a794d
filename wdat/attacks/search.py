"""How hard to look for nearest adversarial points: three efforts by name, and settings that override theirs."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from wdat.errors import SettingError


@dataclass(frozen=True)
class Effort:
    """What a search does in one norm, in this order.

    Attributes:
        candidates: Classes whose linearised boundaries are compared, a backward pass each after one forward pass.
        targets: Targeted descents from the image, towards the classes with the nearest linearised boundaries.
        penalty: Steps of the penalty descent from the image; 0 for none.
        starts: Untargeted descents: the first from the nearest point so far, the others from random points at its
            distance.
        steps: Steps of each descent but the next.
        refine: Steps of the untargeted descent from the nearest point so far; as `steps` where only these are given.
        bisections: Halvings after each stage, of the outer 5 % of the segment from the image to its point.
        fab: Steps of FAB at the end; 0 for none.
        fab_targets: Classes that FAB runs towards; 0 runs it once untargeted, where a step costs a pass a class.
        leave: Whether images whose distance is clearly beyond what a budget pays for leave between the stages.
    """

    candidates: int = 4
    targets: int = 1
    penalty: int = 0
    starts: int = 1
    steps: int = 20
    refine: int = 27
    bisections: int = 3
    fab: int = 0
    fab_targets: int = 0
    leave: bool = True


THOROUGH = Effort(candidates=10, targets=3, penalty=100, starts=2, steps=50, refine=50, bisections=5, leave=False)
EFFORTS: dict[str, dict[str, Effort]] = {
    "quick": dict.fromkeys(("linf", "l2"), Effort(candidates=6, starts=0, steps=9)),
    "default": {"linf": Effort(), "l2": Effort(candidates=6, penalty=100, refine=20)},
    "thorough": {"linf": THOROUGH, "l2": THOROUGH},
}
OVERRIDES = tuple(f.name for f in fields(Effort) if f.name != "leave")


@dataclass(frozen=True)
class Search:
    """How hard to look.

    Attributes:
        effort: `quick`: at most 30 forward and backward passes an image; `default`: at most 110 in linf, 320 in l2;
            `thorough`: several targets and starts for all images, for networks whose gradients mislead.
        batch_size: Images per pass.
        seed: Of the random starts, which are drawn for each image by its place in the set.
        candidates, targets, penalty, starts, steps, refine, bisections, fab, fab_targets: As `Effort` has them; None
            leaves the effort's own.
    """

    effort: str = "default"
    batch_size: int = 512
    seed: int = 0
    candidates: int | None = None
    targets: int | None = None
    penalty: int | None = None
    starts: int | None = None
    steps: int | None = None
    refine: int | None = None
    bisections: int | None = None
    fab: int | None = None
    fab_targets: int | None = None

    def __post_init__(self) -> None:
        if self.effort not in EFFORTS:
            known = ", ".join(EFFORTS)
            raise SettingError(
                f"unknown effort '{self.effort}' (attack_options.knapsack.effort): choose one of {known}"
            )
        for name in ("batch_size", "seed", *OVERRIDES):
            value, least = getattr(self, name), int(name in ("candidates", "steps", "refine", "batch_size"))
            if value is not None and value < least:
                bound = "at least 1" if least else "at least 0"
                raise SettingError(f"attack_options.knapsack.{name}={value} must be {bound}")
        for own in map(self.within, EFFORTS[self.effort]):
            if not (own.targets or own.penalty or own.starts or own.fab):
                raise SettingError(
                    "attack_options.knapsack.targets=0 leaves nothing to search with; set targets, starts, penalty or "
                    "fab to at least 1"
                )

    def within(self, norm: str) -> Effort:
        """What it does in one norm."""
        given = {name: getattr(self, name) for name in OVERRIDES if getattr(self, name) is not None}
        if "steps" in given:
            given.setdefault("refine", given["steps"])
        return replace(EFFORTS[self.effort][norm], **given)
