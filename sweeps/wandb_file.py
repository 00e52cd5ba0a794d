"""Reads the file of an offline run of W&B: records of its protocol in LevelDB's log format, each block checked."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32768, 7
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass
class Told:
    """What a run has told W&B.

    Attributes:
        history: Its rows, in order.
        config: Its settings.
        metrics: Names of metrics that were defined, logged or not, with the names of their axes.
        artifacts: Kind and files of each artifact, by name.
        exit_code: Of the run; None where it hasn't ended.
        run: Its name, group and tags, as W&B's own record.
    """

    history: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, str] = field(default_factory=dict)
    artifacts: dict[str, tuple[str, list[str]]] = field(default_factory=dict)
    exit_code: int | None = None
    run: Any = None


def payloads(content: bytes) -> Iterator[bytes]:
    """The records' bytes.

    A file begins with `:W&B`, a magic number and a version, in all as long as the header of a chunk. Each chunk has a
    checksum, a length and a kind, and none crosses the end of a block.
    """
    assert content[:4] == b":W&B"
    at = HEADER
    parts: list[bytes] = []
    while at + HEADER <= len(content):
        if BLOCK - at % BLOCK < HEADER:  # too short for a chunk, filled with zeros
            at += BLOCK - at % BLOCK
            continue
        checksum, length, kind = struct.unpack("<IHB", content[at : at + HEADER])
        data = content[at + HEADER : at + HEADER + length]
        assert len(data) == length, "a torn file"
        assert zlib.crc32(content[at + HEADER - 1 : at + HEADER] + data) == checksum
        assert (kind in (WHOLE, FIRST)) == (not parts), "chunks out of order"
        parts.append(data)
        at += HEADER + length
        if kind in (WHOLE, LAST):
            yield b"".join(parts)
            parts = []


def read(path: Path) -> Told:
    """What a run has told W&B, from its file `*.wandb`."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    found = Told()
    for payload in payloads(path.read_bytes()):
        record = Record.FromString(payload)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            row = {}
            for item in record.history.item:
                row["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
            found.history.append(row)
        elif kind == "config":
            for item in record.config.update:
                found.config[".".join(item.nested_key) or item.key] = json.loads(item.value_json)
        elif kind == "metric":
            found.metrics[record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif kind == "artifact":
            files = [entry.path for entry in record.artifact.manifest.contents]
            found.artifacts[record.artifact.name] = (record.artifact.type, files)
        elif kind == "exit":
            found.exit_code = record.exit.exit_code
        elif kind == "run":
            found.run = record.run
    return found
