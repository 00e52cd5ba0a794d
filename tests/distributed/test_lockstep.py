"""Sets that processes share, simulated by threads: order, pictures, and a folder that any number of them may use."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from process_runner import alike
from sampled import sampled
from small_problems import small_network
from torch import nn

from wdat.attacks import build
from wdat.attacks.knapsack import Knapsack
from wdat.data.batch import Batch
from wdat.distributed import ALONE
from wdat.errors import RunError, SettingError
from wdat.evaluation.evaluator import Evaluator, ImageTensors, evaluate, positions
from wdat.evaluation.session import Session
from wdat.records import Facts, RecordFile, read
from wdat.threat import ThreatModel

SEARCH = {"starts": 2, "targets": 1, "steps": 6, "bisections": 3}
THREAT = ThreatModel(2, "linf", 0.03)


@pytest.fixture(scope="module")
def problem():
    """A network and 11 images, of which the first and every third are misclassified."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = small_network().eval()
        x = torch.rand(11, 1, 8, 8, dtype=torch.float64)
        y = network(x).argmax(1)
    y[::3] = (y[::3] + 1) % 10
    return SimpleNamespace(network=network, x=x, y=y)


def share(problem, rank, world):
    rows = torch.arange(rank, len(problem.y), world)
    return ImageTensors(problem.x[rows], problem.y[rows], rows)


def plain(records):
    return [{k: v for k, v in r.to_json().items() if k != "seconds"} for r in records]


def timeless(records):
    """Without what depends on how far the search had come when each budget was asked for."""
    kept = plain(records)
    for record in kept:
        record["details"] = {k: v for k, v in record["details"].items() if k not in ("effort", "valid_up_to", "curve")}
    return kept


# --- the order of a set ---------------------------------------------------------------------------------------------


def test_places_are_those_of_the_rows_in_the_split(together):
    """Whatever rows of a split make up the set, and however they are divided."""
    index = [torch.tensor([40, 7, 12]), torch.tensor([], dtype=torch.int64), torch.tensor([3, 41])]
    images = [ImageTensors(torch.zeros(len(i), 1, 2, 2), torch.zeros(len(i), dtype=torch.int64), i) for i in index]
    found = together(3, lambda p: positions(images[p.rank], p))
    assert [rows.tolist() for rows, _ in found] == [[3, 1, 2], [], [0, 4]]
    assert {size for _, size in found} == {5}


def test_without_rows_the_first_process_comes_first(together):
    counts = [2, 0, 3]
    images = [ImageTensors(torch.zeros(n, 1, 2, 2), torch.zeros(n, dtype=torch.int64)) for n in counts]
    found = together(3, lambda p: positions(images[p.rank], p))
    assert [rows.tolist() for rows, _ in found] == [[0, 1], [], [2, 3, 4]]


def test_repeated_images_are_refused_on_all_processes(together):
    """A sampler that makes shards even by repeating images, as torch's own does."""
    index = [torch.tensor([0, 2]), torch.tensor([1, 0])]
    images = [ImageTensors(torch.zeros(2, 1, 2, 2), torch.zeros(2, dtype=torch.int64), i) for i in index]

    def one(processes):
        with pytest.raises(SettingError, match=r"come twice.*use_distributed_sampler=false"):
            positions(images[processes.rank], processes)
        return True

    assert together(2, one) == [True, True]


def test_collecting_batches_keeps_rows_where_they_are_known():
    x, y, index = torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 0]), torch.tensor([5, 3, 4])
    batches = [Batch(x[s], y[s], index[s], index[s], 3, 0) for s in (slice(0, 2), slice(2, 2), slice(2, 3))]
    found = ImageTensors.collect(batches, torch.device("cpu"))
    assert torch.equal(found.index, index)
    assert torch.equal(found.x, x)
    assert ImageTensors.collect([(x, y, "more")], torch.device("cpu")).index is None
    empty = ImageTensors.collect([batches[1]], torch.device("cpu"))
    assert (empty.x.shape, len(empty.y), len(empty.index)) == ((0, 1, 2, 2), 0, 0)


# --- figures and pictures -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", sampled([2, 12], 2))
def test_records_with_pictures_are_those_of_one_process(together, problem, world):
    """Of 12 processes one has no image; the network can't take an empty batch."""
    attacks = [build("pgd", steps=3, step_size=0.5), build("wpgd", steps=3, loss="margin"), build("wfgsm")]
    attacks += [build("knapsack", **SEARCH), build("wpgd_budget", steps=2, loss="kl", radius_max=4.0)]
    attacks += [build("knapsack", **SEARCH, batch_size=3)]

    def one(processes):
        images = share(problem, processes.rank, processes.world_size)
        evaluator = Evaluator(copy.deepcopy(problem.network), images, 4, processes=processes, pictures=True)
        records = [evaluator.clean(THREAT, loss) for loss in ("ce", "redlr")]
        return plain(records + [evaluator.attacked(attack, THREAT) for attack in attacks])

    alone = one(ALONE)
    assert all(r["details"]["examples"] for r in alone[2:])
    for found in together(world, one):
        alike(alone, found, rel=1e-9)


def test_a_process_whose_images_are_all_misclassified_keeps_step(together, problem):
    """It has nothing to search, but as many figures of the effort to share."""
    parts = [problem.y == problem.network(problem.x).argmax(1)]
    parts.append(~parts[0])
    options = {"knapsack": SEARCH}

    def one(processes):
        mine = parts[processes.rank]
        images = ImageTensors(problem.x[mine], problem.y[mine])
        network = copy.deepcopy(problem.network)
        return evaluate(network, images, THREAT, ["knapsack"], options=options, processes=processes)[-1]

    first, second = together(2, one)
    assert first.details == second.details
    assert len(first.details["effort"]) == 3
    assert first.n == 11


def test_an_error_of_the_search_on_one_process_is_raised_on_all(together, problem):
    class Broken(nn.Module):
        def forward(self, x):
            raise MemoryError("no room")

    def one(processes):
        session = Session.__new__(Session)
        images = share(problem, processes.rank, 2)
        session.evaluator = Evaluator(copy.deepcopy(problem.network), images, processes=processes)
        network = Broken() if processes.rank else session.evaluator.network
        object.__setattr__(session.evaluator, "network", network)
        try:
            session.evaluator.attacked(build("knapsack", **SEARCH), THREAT)
        except (MemoryError, RunError) as error:
            return str(error)
        return ""

    found = together(2, one)
    assert found == ["process 1: MemoryError: no room", "no room"]


# --- a folder for any number of processes ---------------------------------------------------------------------------


@pytest.fixture
def searches(monkeypatch):
    """The norms of the searches that were really made, one entry a process."""
    made = []
    inner = Knapsack.find

    def find(self, network, x, y, norm, context=None, **options):
        made.append(norm)
        return inner(self, network, x, y, norm, context, **options)

    monkeypatch.setattr(Knapsack, "find", find)
    return made


@pytest.fixture
def measure(problem, together):
    """`measure(folder, world, deltas)`: a session of that many processes in a folder, its records by process."""

    def run(folder, world, deltas=(0.01,), images=share):
        folder.mkdir(exist_ok=True)

        def one(processes):
            mine = images(problem, processes.rank, processes.world_size)
            evaluator = Evaluator(
                copy.deepcopy(problem.network), mine, facts=Facts("net"), processes=processes, pictures=True
            )
            results = RecordFile(folder / "records.json" if processes.rank == 0 else None)
            session = Session(evaluator, results, folder)
            session.clean(THREAT, "ce")
            radii = torch.full((11,), 0.001, dtype=torch.float64)
            for delta in deltas:
                for attack in (build("wpgd", steps=2), build("knapsack", **SEARCH)):
                    session.attacked(attack, ThreatModel(2, "linf", delta))
                session.certified(radii, "radii.npy", ThreatModel(2, "linf", delta))
            session.save_distances([build("knapsack", **SEARCH)], "linf")
            return len(results.records)

        return [one(ALONE)] if world == 1 else together(world, one)

    return run


@pytest.mark.long
def test_one_folder_serves_any_number_of_processes(measure, searches, tmp_path):
    """Begun by one, three or twelve and finished by others: the search is made once, the figures are those of one."""
    measure(tmp_path / "one", 1, (0.01, 0.02, 0.03))
    wanted = read(tmp_path / "one" / "records.json")
    for number, worlds in enumerate([(1, 3, 12), (3, 2, 1)]):
        searches.clear()
        folder = tmp_path / str(number)
        counts = [measure(folder, world, [0.01, 0.02, 0.03][: k + 1]) for k, world in enumerate(worlds)]
        assert searches == ["linf"] * 2 * worlds[0], "made by the first, and finished for all images; others read it"
        assert [found[0] for found in counts] == [4, 7, 10]
        found = read(folder / "records.json")
        alike(*(timeless(records) for records in (wanted, found)), rel=1e-9)
        with np.load(tmp_path / "one" / "distances_linf.npz") as a, np.load(folder / "distances_linf.npz") as b:
            np.testing.assert_allclose(a["distances"], b["distances"], rtol=1e-9)
            np.testing.assert_array_equal(a["labels"], b["labels"])
        assert {f.name for f in folder.iterdir()} == {
            "records.json",
            "examples",
            "nearest_linf.pt",
            "distances_linf.npz",
        }


@pytest.mark.long
def test_flips_of_other_images_or_labels_are_not_reused(measure, searches, problem, tmp_path):
    def relabelled(problem, rank, world):
        images = share(problem, rank, world)
        return ImageTensors(images.x, (images.y + (images.index == 4)) % 10, images.index)

    def moved(problem, rank, world):
        images = share(problem, rank, world)
        return ImageTensors(images.x.flip(3), images.y, images.index)

    for number, images in enumerate((relabelled, moved)):
        folder = tmp_path / str(number)
        measure(folder, 2)
        (folder / "records.json").unlink()
        searches.clear()
        measure(folder, 2, images=images)
        assert searches == ["linf"] * 2 * 2, "for the budget, and for all images"


@pytest.mark.parametrize("content", [b"nothing", b"", b"PK\x03\x04"])
def test_a_damaged_file_is_named_on_all_processes(together, problem, tmp_path, content):
    (tmp_path / "nearest_linf.pt").write_bytes(content)

    def one(processes):
        evaluator = Evaluator(copy.deepcopy(problem.network), share(problem, processes.rank, 2), processes=processes)
        session = Session(evaluator, RecordFile(None), tmp_path)
        with pytest.raises(SettingError, match=r"nearest_linf\.pt can't be read.*delete it"):
            session.attacked(build("knapsack", **SEARCH), THREAT)
        return True

    assert together(2, one) == [True, True]
    assert (tmp_path / "nearest_linf.pt").read_bytes() == content
