"""Partitions on a real GPU: the proof, the providers that must work there, teardown, and the engine's guard."""

from __future__ import annotations

import pytest

from fastcache.config import PartitionConfig
from fastcache.device import green_context, proof
from fastcache.device.probe import Probe
from fastcache.device.providers import cuda_bindings, driver_split, torch_green
from fastcache.device.sms import plan_split
from fastcache.device.streams import CaptureWithoutStream, hand_over

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FIFTH = PartitionConfig(True, 0.2, 0.8, main_stream=True, require=True)


@pytest.fixture(scope="module")
def probe() -> Probe:
    return Probe(torch.cuda.current_device())


def test_the_whole_proof() -> None:
    record = proof.prove(torch.cuda.current_device(), changes=200, require=True)
    assert record["status"] == "proven", record["reason"]


def test_the_split_is_disjoint_and_as_granted(probe: Probe) -> None:
    partition = green_context.partition(FIFTH, "cuda")
    total = green_context.device_sms(torch.cuda.current_device()).total
    main, compress = (probe.measure(stream, total).ids for stream in partition.streams)
    assert not main & compress
    assert partition.granted_sms == {"main": len(main), "compress": len(compress)}


def test_main_stream_off_keeps_the_whole_gpu(probe: Probe) -> None:
    partition = green_context.partition(PartitionConfig(True, 0.2, 0.8), "cuda")
    total = green_context.device_sms(torch.cuda.current_device()).total
    assert len(probe.measure(partition.main, total).ids) == total == partition.granted_sms["main"]
    assert len(probe.measure(partition.compress, total).ids) == partition.granted_sms["compress"] < total


def test_idle_sms_belong_to_neither_side(probe: Probe) -> None:
    sms = green_context.device_sms(torch.cuda.current_device())
    split = plan_split(sms, 0.25, 0.5)
    pair = cuda_bindings.PROVIDER.create(torch.cuda.current_device(), split)
    try:
        main, compress = (probe.measure(stream, sms.total).ids for stream in (pair.main, pair.compress))
        assert (len(main), len(compress)) == (split.main, split.compress) and not main & compress
    finally:
        torch.cuda.synchronize()
        cuda_bindings.PROVIDER.destroy(pair)


def test_the_driver_names_the_granularity() -> None:
    sms = green_context.device_sms(torch.cuda.current_device())
    assert sms.source == "driver" and sms.total % 2 == 0 and sms.minimum % sms.alignment == 0


def test_torchs_own_context_caps_one_side(probe: Probe) -> None:
    if not hasattr(torch.cuda, "green_contexts"):
        pytest.skip("this torch has no green contexts")
    sms = green_context.device_sms(torch.cuda.current_device())
    pair = torch_green.PROVIDER.create(torch.cuda.current_device(), plan_split(sms, 0.25, 0.75))
    assert pair.main is None and not pair.exclusive
    assert len(probe.measure(pair.compress, sms.total).ids) < sms.total


def test_the_same_split_is_the_same_pair_and_costs_nothing_more() -> None:
    first = green_context.partition(FIFTH, "cuda")
    free = torch.cuda.mem_get_info()[0]
    again = [green_context.partition(FIFTH, "cuda") for _ in range(100)]
    assert all(each.streams == first.streams for each in again)
    assert torch.cuda.mem_get_info()[0] == free


def test_a_graph_cannot_be_captured_on_another_stream() -> None:
    partition = green_context.partition(FIFTH, "cuda")
    with pytest.raises(CaptureWithoutStream):
        partition.capture(torch.cuda.CUDAGraph(), None)
    with pytest.raises(CaptureWithoutStream):
        partition.capture(torch.cuda.CUDAGraph(), torch.cuda.Stream())


def test_work_handed_from_side_to_side_is_in_order() -> None:
    partition = green_context.partition(FIFTH, "cuda")
    for _ in range(50):
        with torch.cuda.stream(partition.main):
            torch.cuda._sleep(1_000_000)
            x = torch.ones(1 << 20, device="cuda")
        hand_over(partition.main, partition.compress, x)
        with torch.cuda.stream(partition.compress):
            y = x * 2
        hand_over(partition.compress, torch.cuda.current_stream(), y)
        assert y.sum().item() == 2 * (1 << 20)


def test_teardown_in_order_and_a_new_pair_after_it(probe: Probe) -> None:
    """Last in this file: it destroys every cached pair."""
    if driver_split.importable():
        pytest.skip("cuda-bindings is not installed")
    green_context.partition(FIFTH, "cuda")
    green_context.release_all()
    total = green_context.device_sms(torch.cuda.current_device()).total
    partition = green_context.partition(FIFTH, "cuda")
    assert len(probe.measure(partition.main, total).ids) == partition.granted_sms["main"]
