"""The provider chain: order, every failure class, what is recorded, caching, fall-back and `require`."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastcache.config import PartitionConfig
from fastcache.device import green_context, streams
from fastcache.device.providers.base import KINDS, Pair, ProviderError, cause_chain, classify
from fastcache.device.sms import DeviceSms
from fastcache.errors import UnsupportedCombination

ON = PartitionConfig(enabled=True, compress_ratio=0.2, main_ratio=0.8, main_stream=True)


class Provider:
    """A provider that fails with `error`, or grants what was asked (or `granted`)."""

    def __init__(self, name: str, error: ProviderError | None = None, **pair: object) -> None:
        self.name, self.error, self.pair = name, error, pair
        self.made, self.destroyed = [], []

    def create(self, device: int, split) -> Pair:
        self.made.append((device, split))
        if self.error:
            raise self.error
        number = len(self.made)
        values = {
            "main": f"{self.name}-main-{number}",
            "compress": f"{self.name}-compress-{number}",
            "granted_main": split.main,
            "granted_compress": split.compress,
            "granted_from": "op",
            "exclusive": True,
        } | self.pair
        return Pair(self.name, **values)

    def destroy(self, pair: Pair) -> None:
        self.destroyed.append(pair)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine with one H100, as far as the chain can see. `gpu.providers` is the chain to use."""
    import torch

    torn_down = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: torn_down.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: torn_down.append("empty_cache"))
    monkeypatch.setattr(
        torch._C, "_cuda_clearCublasWorkspaces", lambda: torn_down.append("workspaces"), raising=False
    )
    monkeypatch.setattr(green_context, "device_sms", lambda _: DeviceSms(132, 8, 8, "driver"))
    monkeypatch.setattr(
        streams, "plain_pair", lambda index: (f"plain-main-{index}", f"plain-compress-{index}")
    )
    monkeypatch.setattr(green_context, "_cache", {})
    monkeypatch.setattr(green_context, "_plain", {})

    def use(*providers: Provider) -> None:
        monkeypatch.setattr(green_context, "PROVIDERS", providers)

    return SimpleNamespace(use=use, torn_down=torn_down)


def failing(name: str, kind: str = "unexpected", cause: str = "it broke") -> Provider:
    return Provider(name, ProviderError(kind, cause))


def test_the_order_of_the_real_chain() -> None:
    assert [provider.name for provider in green_context.PROVIDERS] == [
        "sgl_kernel",
        "sgl_kernel:spatial_ops",
        "sgl_kernel:spatial_ops+shim",
        "cuda_bindings",
        "torch_green",
    ]


@pytest.mark.parametrize("winner", range(5))
def test_the_first_that_works_wins_and_every_attempt_is_kept(gpu: SimpleNamespace, winner: int) -> None:
    chain = [failing(f"p{i}", "driver_error", f"cause {i}") for i in range(winner)]
    chain += [Provider(f"p{i}") for i in range(winner, 5)]
    gpu.use(*chain)
    partition = green_context.partition(ON, "cuda:0")
    assert partition.provider == f"p{winner}" and partition.available and partition.exclusive
    assert [attempt["ok"] for attempt in partition.attempts] == [False] * winner + [True]
    assert [attempt["cause"] for attempt in partition.attempts[:-1]] == [f"cause {i}" for i in range(winner)]
    assert all(not provider.made for provider in chain[winner + 1 :]), "nobody is tried after the winner"


def test_requested_and_granted_are_both_recorded(gpu: SimpleNamespace) -> None:
    gpu.use(Provider("p", granted_main=108, granted_compress=24))
    report = green_context.partition(ON, "cuda:0").report()
    assert report["requested_sms"] == {"main": 106, "compress": 26}
    assert report["granted_sms"] == {"main": 108, "compress": 24}
    assert report["greenctx_available"] is True and report["greenctx_provider"] == "p"
    assert report["greenctx_granted_from"] == "op" and report["greenctx_reason"] is None


@pytest.mark.parametrize("kind", KINDS)
def test_every_failure_class_ends_in_plain_streams_with_its_reason(gpu: SimpleNamespace, kind: str) -> None:
    gpu.use(failing("a", kind, f"cause of\n{kind}"))
    partition = green_context.partition(ON, "cuda:0")
    assert partition.provider == "plain_streams" and not partition.available and partition.granted_sms is None
    assert partition.streams == ("plain-main-0", "plain-compress-0")
    assert partition.reason == f"cause of {kind}" and "\n" not in partition.reason
    assert [attempt["kind"] for attempt in partition.attempts] == [kind, None]
    assert partition.attempts[-1] == {"provider": "plain_streams", "ok": True, "kind": None, "cause": None}


def test_several_failures_are_named_one_by_one(gpu: SimpleNamespace) -> None:
    gpu.use(failing("a", cause="first"), failing("b", cause="second"))
    assert green_context.partition(ON, "cuda:0").reason == "a: first; b: second"


def test_required_and_impossible_is_an_error(gpu: SimpleNamespace) -> None:
    gpu.use(failing("a", cause="no driver"))
    with pytest.raises(UnsupportedCombination, match=r"require_greenctx.*no driver.*fastcache doctor"):
        green_context.partition(PartitionConfig(True, 0.2, 0.8, main_stream=True, require=True), "cuda:0")


def test_main_stream_off_leaves_the_main_stream_the_whole_gpu(gpu: SimpleNamespace) -> None:
    gpu.use(Provider("p"))
    partition = green_context.partition(PartitionConfig(True, 0.2, 0.8), "cuda:0")
    assert partition.main == "plain-main-0" and partition.compress == "p-compress-1"
    assert partition.granted_sms == {"main": 132, "compress": 28}
    assert partition.available and not partition.exclusive
    assert "keeps the whole GPU" in partition.report()["greenctx_reason"]


def test_a_one_sided_cap_is_not_a_pair(gpu: SimpleNamespace) -> None:
    cap = {"main": None, "granted_main": None, "granted_compress": None, "exclusive": False, "note": "a cap"}
    gpu.use(Provider("torch_green", **cap))
    partition = green_context.partition(ON, "cuda:0")
    assert not partition.available and partition.main == "plain-main-0" and "a cap" in partition.reason
    assert partition.granted_sms == {"main": 132, "compress": None}
    with pytest.raises(UnsupportedCombination, match="no disjoint pair"):
        green_context.partition(PartitionConfig(True, 0.2, 0.8, main_stream=True, require=True), "cuda:0")
    capped = green_context.partition(PartitionConfig(True, 0.2, 0.8, require=True), "cuda:0")
    assert capped.available, "with main_stream off a cap is all that was asked for"


@given(ratios=st.lists(st.sampled_from([0.06, 0.12, 0.2, 0.25, 0.3, 0.4, 0.5]), min_size=1, max_size=60))
def test_each_split_is_made_once_however_often_it_changes(ratios: list[float]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        provider = Provider("p")
        patch.setattr(green_context, "PROVIDERS", (provider,))
        patch.setattr(green_context, "_cache", {})
        patch.setattr(green_context, "_plain", {0: ("m", "c")})
        patch.setattr(green_context, "_no_gpu", lambda _: None)
        patch.setattr(green_context, "device_sms", lambda _: DeviceSms(132, 8, 8))
        seen = {}
        for ratio in ratios:
            config = PartitionConfig(True, ratio, 1 - ratio, main_stream=True)
            partition = green_context.partition(config, "cuda:0")
            assert seen.setdefault(ratio, partition.compress) == partition.compress
    assert len(provider.made) == len(set(ratios))


def test_a_failed_chain_is_not_tried_again(gpu: SimpleNamespace) -> None:
    bad = failing("a")
    gpu.use(bad)
    for _ in range(3):
        green_context.partition(ON, "cuda:0")
    assert len(bad.made) == 1


def test_two_threads_make_one_pair(gpu: SimpleNamespace) -> None:
    provider = Provider("p")
    gpu.use(provider)
    threads = [threading.Thread(target=green_context.partition, args=(ON, "cuda:0")) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(provider.made) == 1


def test_release_waits_clears_and_then_destroys(gpu: SimpleNamespace) -> None:
    provider = Provider("p")
    gpu.use(provider)
    green_context.partition(ON, "cuda:0")
    green_context.release_all()
    assert gpu.torn_down == ["synchronize", "workspaces", "empty_cache"] and len(provider.destroyed) == 1
    green_context.release_all()
    assert len(provider.destroyed) == 1
    green_context.partition(ON, "cuda:0")
    assert len(provider.made) == 2


def test_a_request_that_cannot_be_granted_says_what_can(gpu: SimpleNamespace) -> None:
    gpu.use(Provider("p"))
    with pytest.raises(UnsupportedCombination, match=r"asks for 1 of 132 SMs.*steps of 8"):
        green_context.partition(PartitionConfig(True, 0.005, 0.5), "cuda:0")


def test_the_cpu_is_a_recorded_fallback() -> None:
    partition = green_context.partition(ON, "cpu")
    report = partition.report()
    assert partition.streams == (None, None)
    assert report["greenctx_available"] is False and report["granted_sms"] is None
    assert report["greenctx_reason"].startswith("the device is a CPU, which has no SMs to split")
    assert [attempt["provider"] for attempt in report["greenctx_attempts"]] == ["cuda"]


def test_the_cpu_is_an_error_where_green_contexts_are_required() -> None:
    with pytest.raises(UnsupportedCombination, match="no SMs to split"):
        green_context.partition(PartitionConfig(True, 0.2, 0.8, require=True), "cpu")


def test_nothing_is_reported_where_nothing_was_asked() -> None:
    report = green_context.partition(PartitionConfig(), "cpu").report()
    asked = ("greenctx_available", "greenctx_reason", "greenctx_provider", "requested_sms", "granted_sms")
    assert all(report[name] is None for name in asked) and report["greenctx_attempts"] == []


SGL_WRAPPED = ImportError("Failed to load sgl_kernel.spatial_ops extension. Ensure CUDA Driver >= 12.4")


@pytest.mark.parametrize(
    ("text", "kind", "cause"),
    [
        ("OSError: x.so: undefined symbol: _ZN3c104warnERKNS_7WarningE", "abi_refused", "_ZN3c104warn"),
        (
            "x.so: undefined symbol: _ZSt21ios_base_library_initv",
            "missing_system_lib",
            "ios_base_library_init",
        ),
        ("libcuda.so.1: cannot open shared object file: No such file", "no_driver", "no NVIDIA driver"),
        ("libc10_cuda.so: cannot open shared object file", "cpu_torch", "CPU build"),
        ("libnvrtc.so.12: cannot open shared object file", "cuda_major_mismatch", "libnvrtc.so.12"),
        ("libnuma.so.1: cannot open shared object file", "missing_system_lib", "libnuma.so.1"),
        ("/lib/libstdc++.so.6: version `GLIBCXX_3.4.32' not found", "missing_system_lib", "GLIBCXX_3.4.32"),
        ("RuntimeError: No CUDA GPUs are available", "no_gpu", "no CUDA device"),
        (
            "RuntimeError: Not enough SMs available for the requested configuration",
            "driver_error",
            "Not enough SMs",
        ),
        ("something else", "unexpected", "something else"),
    ],
)
def test_causes_are_classified(text: str, kind: str, cause: str) -> None:
    found, line = classify(text)
    assert found == kind and cause in line


def test_the_wheels_own_sentence_is_never_the_reason() -> None:
    try:
        try:
            raise OSError("libnuma.so.1: cannot open shared object file: No such file or directory")
        except OSError as error:
            raise SGL_WRAPPED from error
    except ImportError as error:
        assert classify(cause_chain(error)) == (
            "missing_system_lib",
            "libnuma.so.1 is missing on this system",
        )


def test_the_import_report_of_the_package_is_read_to_its_end() -> None:
    text = (
        "CRITICAL: Could not load any common_ops library! - CUDA version: 13.0 "
        "Error details from previous import attempts: - ImportError: libcudart.so.12: cannot open shared object file"
    )
    assert classify(text)[0] == "cuda_major_mismatch"


class Stream:
    """Enough of a torch stream to be told apart and to record who waited for whom."""

    def __init__(self) -> None:
        self.waited, self.kept = [], []

    def wait_stream(self, other: Stream) -> None:
        self.waited.append(other)

    def record_stream(self, stream: Stream) -> None:
        self.kept.append(stream)


def test_a_hand_over_waits_and_keeps_the_tensors() -> None:
    producer, consumer, tensor = Stream(), Stream(), Stream()
    streams.hand_over(producer, consumer, tensor)
    assert consumer.waited == [producer] and producer.waited == [] and tensor.kept == [consumer]
    streams.hand_over(None, consumer, tensor)
    streams.hand_over(consumer, consumer, tensor)
    assert consumer.waited == [producer] and tensor.kept == [consumer]


def test_a_capture_names_a_stream_of_its_partition() -> None:
    main, compress, other = Stream(), Stream(), Stream()
    assert streams.capture_stream_check(compress, (main, compress)) is compress
    with pytest.raises(streams.CaptureWithoutStream, match="without naming a stream"):
        streams.capture_stream_check(None, (main, compress))
    with pytest.raises(streams.CaptureWithoutStream, match="not a stream of this partition"):
        streams.capture_stream_check(other, (main, None))
