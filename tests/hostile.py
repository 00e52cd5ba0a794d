"""What the tests of security share: short runs, records, and a strict reader of pages."""

from __future__ import annotations

import base64
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

from wdat import records
from wdat.records import Record
from wdat.reporting.report import write_report

ROOT = Path(__file__).parents[1]
TRAIN, EVALUATE = ROOT / "train.py", ROOT / "evaluate.py"
SECRETS = {"WANDB_API_KEY": "secret123" * 4 + "abcd", "WDAT_TEST_TOKEN": "secret456secret456"}
EVALUATION = "evaluation.attack_options"
TRAINED = [
    "experiment=quickstart", "trainer.accelerator=cpu", "trainer.devices=1", "trainer.max_epochs=1", "attack.steps=1",
    "trainer.check_val_every_n_epoch=1", "evaluation.curve=[]", "pretrain.max_epochs=0", f"{EVALUATION}.pgd.steps=1",
    f"{EVALUATION}.wpgd.steps=1", "data.limit_train=32", "data.limit_val=32", "data.limit_test=32",
]  # fmt: skip
EVALUATED = [
    "model=small_cnn", "trainer.accelerator=cpu", "trainer.devices=1", "threat.delta=0.002", "losses=[ce]",
    "attacks=[pgd,knapsack]",
    "attack_options.pgd.steps=1", "attack_options.knapsack.steps=2", "attack_options.knapsack.starts=1",
    "attack_options.knapsack.targets=1",
]  # fmt: skip

PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg==")
CLEAN = Record(
    stage="evaluate", network="net", checkpoint="", data="digits", split="test", attack="none", options={}, loss="ce",
    p=2.0, norm="linf", delta=0.0, n=100, set_size=100, accuracy=0.8, accuracy_low=0.7, accuracy_high=0.9,
    loss_mean=1.0, distance=0.0, seconds=0.1, seed=0, device="cpu", commit="abc", versions={"torch": "2"}, upsilon=10.0,
    loss_misclassified=3.0,
)  # fmt: skip
EXAMPLE = {"picture": PNG, "label": 3, "prediction": 5, "radius": 0.1}
WPGD = replace(
    CLEAN, attack="wpgd", delta=0.04, accuracy=0.446, accuracy_low=0.4, accuracy_high=0.5, upsilon=None, distance=0.04,
    loss_misclassified=None, loss_mean=1.2, options={"steps": 3},
    details={"histogram": {"edges": [0.0, 0.05, 0.1], "counts": [70.0, 30.0]}, "examples": [EXAMPLE],
             "bound": "upper", "critical_distance": 0.08, "curve": [[0.0, 0.8], [0.02, 0.5]], "moved": 52,
             "effort": [[100, 0.35], [200, 0.29]]},
)  # fmt: skip


class Page(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)

    def check(self):
        """Nothing here runs, and nothing is fetched."""
        for tag, attributes in self.tags:
            assert tag not in ("script", "iframe", "object", "embed", "link", "base", "form", "foreignobject")
            for name, value in attributes.items():
                assert not name.startswith("on")
                assert "alert" not in (value or "")
                if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                    assert value.startswith(("#", "data:image/png;base64,"))
                if value and value.startswith("data:"):
                    content = base64.b64decode(value.partition(",")[2], validate=True)
                    assert content.startswith(b"\x89PNG")
        policy = [a["content"] for t, a in self.tags if t == "meta" and "http-equiv" in a]
        assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
        return self


def page_of(found, folder):
    """The report of records that were written and read again."""
    records.write(folder / "records.json", found)
    write_report(records.read(folder / "records.json"), folder / "report.html")
    return Page((folder / "report.html").read_text(encoding="utf-8")).check()
