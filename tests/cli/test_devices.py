"""Several devices and BatchNorm, and a memory that is full."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf
from small_training import small_cnn, trainer_for, with_batchnorm
from torch import nn

from wdat.cli.devices import active_batchnorm, memory_errors, synchronised, told
from wdat.errors import RunError, SettingError


def settings(value=None):
    return OmegaConf.create({"sync_batchnorm": value})


def frozen():
    network = with_batchnorm()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False)
    return network


@pytest.mark.parametrize(
    ("network", "world_size", "on_gpus", "given", "wanted"),
    [
        (with_batchnorm, 2, True, None, True),
        (with_batchnorm, 2, True, True, True),
        (with_batchnorm, 2, True, False, False),
        (with_batchnorm, 2, False, False, False),
        (with_batchnorm, 1, True, None, False),
        (with_batchnorm, 1, False, True, False),
        (small_cnn, 2, True, None, False),
        (small_cnn, 2, False, None, False),
        (frozen, 2, False, None, False),
    ],
)
def test_batchnorm_is_synchronised_unless_it_is_told_otherwise(network, world_size, on_gpus, given, wanted):
    assert synchronised(settings(given), network(), world_size, on_gpus) is wanted


@pytest.mark.parametrize("given", [None, True])
def test_where_it_cannot_be_synchronised_it_is_refused(given):
    with pytest.raises(SettingError, match=r"trainer\.devices=1, or trainer\.sync_batchnorm=false"):
        synchronised(settings(given), with_batchnorm(), 2, on_gpus=False)


def test_frozen_statistics_are_no_matter():
    assert active_batchnorm(with_batchnorm())
    assert not active_batchnorm(frozen())
    assert not active_batchnorm(small_cnn())


def test_the_line_says_how_a_batch_is_divided(monkeypatch):
    trainer = trainer_for(1)
    assert told(trainer, 128, with_batchnorm(), False) == "CPU, precision 32-true"
    monkeypatch.setattr(type(trainer), "world_size", 8)
    line = "8 × CPU, precision 32-true, 16 of each batch's 128 images on each"
    assert told(trainer, 128, small_cnn(), False) == line
    assert told(trainer, 128, with_batchnorm(), True) == f"{line}, BatchNorm over all of them"
    assert told(trainer, 128, with_batchnorm(), False) == f"{line}, BatchNorm of each part alone"


FULL = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which ..."


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError(FULL), " (another 2.00 GiB were wanted)"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), ""),
    ],
)
def test_a_memory_that_is_full_is_told_in_a_sentence(error, said):
    with pytest.raises(RunError) as found, memory_errors(lambda: "set batch_size=1"):
        raise error
    assert str(found.value) == f"the memory of the GPU is full{said}: set batch_size=1"


def test_other_errors_are_left_alone():
    with pytest.raises(KeyError), memory_errors(lambda: "nothing"):
        raise KeyError("x")
