"""One of several processes that evaluate together; prints the records, set by set.

measure.py WORK.json    with torchrun's environment; WORLD_SIZE=1 for one process
"""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from small_problems import small_network

from wdat import ThreatModel, models
from wdat.data import ImageDataModule
from wdat.distributed import current
from wdat.evaluation import ImageTensors
from wdat.evaluation.evaluator import Evaluator, plan


def records(work: dict[str, Any], n: int, precision: str) -> list[dict[str, Any]]:
    """Clean records and attacks on the first n test images, by this process alone or with the group it is in."""
    dtype = getattr(torch, precision)
    if work["network"] == "small":
        network = small_network()
        network.load_state_dict(torch.load(work["weights"], weights_only=True))
    else:
        network = models.load_network(work["network"], checkpoint=work["weights"])
    network = network.to(dtype).eval()
    processes = current(torch.device("cpu"))
    data = ImageDataModule(
        "npz", 10, path=work["images"], val_size=50, limit_test=n, eval_batch_size=work["batch_size"]
    )
    data.setup()
    loader = data.evaluation_loader("test", processes.rank, processes.world_size)
    images = ImageTensors.collect(loader, torch.device("cpu"))
    images = ImageTensors(images.x.to(dtype), images.y, images.index)
    evaluator = Evaluator(network, images, work["batch_size"], processes=processes, pictures=True)
    threat = ThreatModel(work["p"], "linf", work["delta"])
    found = [evaluator.clean(threat, loss) for loss in work["losses"]]
    attacks = plan(work["attacks"], work["losses"], work["options"], work["batch_size"])
    found += [evaluator.attacked(attack, threat) for attack in attacks]
    return [{k: v for k, v in record.to_json().items() if k != "seconds"} for record in found]


def main() -> None:
    """Join the others, measure, leave."""
    work = json.loads(Path(sys.argv[1]).read_text())
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    print(json.dumps([records(work, *case) for case in work["cases"]]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
