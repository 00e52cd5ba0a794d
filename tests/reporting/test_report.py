"""The report: one page that stands alone, says what the records say, and lets no record write HTML."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from hostile import PNG
from sampled import sampled

from wdat.errors import SettingError
from wdat.records import Record
from wdat.reporting.frame import sections, to_frame
from wdat.reporting.report import render, write_report
from wdat.reporting.results import attacks

CLEAN = Record(
    stage="evaluate", network="net", checkpoint="", data="digits", split="test", attack="none", options={}, loss="ce",
    p=2.0, norm="linf", delta=0.0, n=100, set_size=100, accuracy=0.8, accuracy_low=0.7, accuracy_high=0.9,
    loss_mean=1.0, distance=0.0, seconds=0.1, seed=0, device="cpu", commit="abc", versions={"torch": "2"}, upsilon=10.0,
    loss_misclassified=3.0,
)  # fmt: skip
HISTOGRAM = {"edges": [0.0, 0.05, 0.1], "counts": [70.0, 30.0]}
EXAMPLE = {"picture": PNG, "label": 3, "prediction": 5, "radius": 0.1}


def attacked(attack, delta=0.04, accuracy=0.446, **changes):
    base = replace(CLEAN, attack=attack, delta=delta, accuracy=accuracy, accuracy_low=accuracy - 0.05,
                   accuracy_high=accuracy + 0.05, upsilon=None, loss_misclassified=None, distance=delta)  # fmt: skip
    return replace(base, **{"loss_mean": 1.2, **changes})


WPGD = attacked("wpgd", details={"histogram": HISTOGRAM, "examples": [EXAMPLE]})
KNAPSACK = attacked(
    "knapsack", accuracy=0.29, loss="0-1", loss_mean=None,
    details={
        "bound": "upper", "critical_distance": 0.08, "curve": [[0.0, 0.8], [0.02, 0.5], [0.06, 0.1]], "moved": 52,
        "effort": [[100, 0.35], [200, 0.29]], "materialised": {"accuracy": 0.3, "distance": 0.039},
        "histogram": HISTOGRAM, "examples": [EXAMPLE],
    },
)  # fmt: skip
CERTIFIED = attacked(
    "certified", accuracy=0.1, loss="0-1", details={"bound": "lower", "curve": [[0.0, 0.8], [0.05, 0]]}
)
RECORDS = [CLEAN, attacked("pgd", p=math.inf, accuracy=0.6), WPGD, KNAPSACK, CERTIFIED]
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Checks that tags close in order, and keeps tags, attributes and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self):
        return "".join(self.words).replace("\N{NO-BREAK SPACE}", " ")

    def count(self, tag):
        return sum(t == tag for t, _ in self.tags)


def test_the_page_says_what_the_records_say():
    page = Page(render(RECORDS))
    for words in ("80.0 [70.0, 90.0]", "60.0 [55.0, 65.0]", "44.6 [39.6, 49.6]", "at most 29.0",
                  "certified, W₂", "0.08", "52", "30.0", "3 → 5", "0.557", "vacuous", "conditional",
                  "first-order estimate (CE), not a bound"):  # fmt: skip
        assert words in page.text, words


def test_the_page_opens_with_the_answer_and_its_curve():
    text = render(RECORDS)
    main = text[text.index("<main>") :]
    assert main.index("<table>") < main.index("<svg") < main.index("<h3>Details</h3>") < main.index("Under attack")
    assert "knapsack, W₂" in main[: main.index("<svg")]


def test_figures_and_pictures_are_inside():
    page = Page(render(RECORDS))
    assert page.count("svg") == 3
    assert page.count("img") == 2
    assert all(a["alt"] for t, a in page.tags if t == "img")
    assert "first-order estimate, CE" in page.text, "the text of figures is text"


def test_classes_have_their_names_where_these_are_known():
    named = {**EXAMPLE, "names": ["cat", "cat", "dog"]}
    assert "cat → dog" in Page(render([CLEAN, replace(WPGD, details={"examples": [named]})])).text


def test_the_page_stands_alone():
    page = Page(render(RECORDS))
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object")
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "data", "srcset"):
                assert value.startswith(("#", "data:image/png;base64,")), (tag, name, value[:50])
    assert not re.search(r"@import|url\((?!#)", render(RECORDS))


def test_identifiers_are_unique_and_links_lead_somewhere():
    page = Page(render([*RECORDS, *(replace(r, norm="l2") for r in RECORDS)]))
    names = [a["id"] for _, a in page.tags if "id" in a]
    assert len(names) == len(set(names))
    for _, attributes in page.tags:
        for value in (attributes.get("href"), attributes.get("xlink:href")):
            assert value is None or value[1:] in names or value.startswith("data:")


HOSTILE = "<script>alert('x')</script>\"$\\frac$&_"


@pytest.mark.parametrize(
    "where", sampled(["network", "checkpoint", "data", "split", "attack", "loss", "norm", "device", "commit"], 4)
)
def test_no_record_writes_html(where):
    page = Page(render([CLEAN, *(replace(r, **{where: HOSTILE}) for r in RECORDS)]))
    assert page.count("script") == 0
    assert all(not name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_no_detail_writes_html():
    example = {**EXAMPLE, "label": HOSTILE, "prediction": HOSTILE}
    record = replace(KNAPSACK, options={HOSTILE: HOSTILE}, versions={HOSTILE: HOSTILE},
                     details={**KNAPSACK.details, "examples": [example], "moved": HOSTILE})  # fmt: skip
    page = Page(render([CLEAN, record]))
    assert page.count("script") == 0
    assert page.count("img") == 1
    assert all("onerror" not in attributes for _, attributes in page.tags)


def test_the_same_records_give_the_same_bytes(tmp_path):
    write_report(RECORDS, tmp_path / "deep" / "a.html")
    write_report(RECORDS, tmp_path / "b.html")
    assert (tmp_path / "deep" / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_before_and_after_stand_side_by_side():
    before = [replace(r, stage="before") for r in RECORDS]
    after = [replace(r, stage="after", checkpoint="best.ckpt", accuracy=r.accuracy + 0.05) for r in RECORDS]
    page = Page(render([*before, replace(CLEAN, stage="epoch", epoch=1), *after]))
    assert page.count("h2") == 4, "one section, training, how to read, how to repeat"
    for words in ("80.0 → 85.0", "29.0 → 34.0", "accuracy before", "accuracy after", "+5.0", "best.ckpt",
                  "Accuracy after each epoch on 100 images (test)"):  # fmt: skip
        assert words in page.text, words


def test_settings_tell_equal_attacks_apart():
    runs = [attacked("wpgd", options={"steps": s, "size": 1}, accuracy=a) for s, a in ((10, 0.5), (50, 0.4))]
    grid = attacks(sections(to_frame([CLEAN, *runs]))[0])
    assert grid.cells["settings"].tolist()[:2] == ["steps=10", "steps=50"]
    assert "settings" not in attacks(sections(to_frame([CLEAN, runs[0]]))[0]).cells


@pytest.mark.parametrize(
    "records",
    sampled(
        [
            [CLEAN],
            [replace(CLEAN, p=math.inf, upsilon=None, loss_mean=None, loss_misclassified=None)],
            [attacked("pgd", p=math.inf)],
            [replace(r, details={}) for r in RECORDS],
            [replace(r, accuracy=0.0, accuracy_low=0.0, accuracy_high=0.0) for r in RECORDS],
            [replace(CLEAN, accuracy=1.0, loss_misclassified=None), attacked("wpgd", delta=0.0)],
            [replace(r, p=math.inf) for r in RECORDS],
            [replace(r, p=1.0, norm="l2") for r in RECORDS],
            [
                CLEAN,
                replace(KNAPSACK, details={"curve": [[0.0, 0.0]], "histogram": {"edges": [0, 1], "counts": [0.0]}}),
            ],
            [replace(r, delta=2 * r.delta, loss=loss) for r in RECORDS for loss in ("ce", "redlr", "dlr")] + RECORDS,
        ],
        3,
    ),
)
def test_all_kinds_of_records_give_a_page(records):
    assert Page(render(records)).count("h2") == 3


def test_special_cases_are_explained():
    assert "misclassifies every image" in Page(render([replace(CLEAN, accuracy=0.0)])).text
    assert "constant logits" in Page(render([replace(CLEAN, upsilon=0.0)])).text


def test_nothing_to_report_is_an_error(tmp_path):
    with pytest.raises(SettingError, match="evaluation"):
        write_report([replace(CLEAN, stage="epoch")], tmp_path / "a.html")
    assert not (tmp_path / "a.html").exists()


def test_it_fits_a_phone_and_the_dark():
    text = render(RECORDS)
    assert 'name="viewport" content="width=device-width' in text
    assert "prefers-color-scheme:dark" in text
    assert text.count('<div class="scroll"') == text.count("<table>") > 0
