"""What Prometheus reads: vLLM's names where the meaning is the same, `fastcache:` where only this engine has it."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from fastcache.results import RequestOutput
from fastcache.serving.service import EngineService

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0)
BETWEEN_TOKENS = (0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
TOKENS = tuple(float(2**n) for n in range(15))
# name, help, buckets; the unit is in the name
HISTOGRAMS = (
    ("vllm:time_to_first_token_seconds", "From arrival to the first token.", SECONDS),
    ("vllm:inter_token_latency_seconds", "Between two tokens of a request.", BETWEEN_TOKENS),
    (
        "vllm:request_time_per_output_token_seconds",
        "A request's mean time per further token.",
        BETWEEN_TOKENS,
    ),
    ("vllm:e2e_request_latency_seconds", "From arrival to the last token.", SECONDS),
    ("vllm:request_queue_time_seconds", "From arrival to the first step.", SECONDS),
    ("vllm:request_prefill_time_seconds", "From the first step to the first token.", SECONDS),
    ("vllm:request_decode_time_seconds", "From the first token to the last.", SECONDS),
    ("vllm:request_prompt_tokens", "Prompt tokens of a request.", TOKENS),
    ("vllm:request_generation_tokens", "Generated tokens of a request.", TOKENS),
)


class ServerMetrics:
    """Counts finished requests as they end, and asks the engine for its state when it is read."""

    def __init__(self, service: EngineService, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._labels = {"model_name": model_name}
        make = {"labelnames": ["model_name"], "registry": self.registry}
        self._histograms = {
            name: Histogram(name, text, buckets=buckets, **make).labels(**self._labels)
            for name, text, buckets in HISTOGRAMS
        }
        self._success = Counter(
            "vllm:request_success",
            "Requests that ended, by reason.",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self._refused = Counter(
            "fastcache:refused_requests",
            "Requests answered with an error, by HTTP status.",
            ["model_name", "status"],
            registry=self.registry,
        )
        self._compressed = Counter(
            "fastcache:compressed_requests", "Requests whose KV cache was compressed.", **make
        ).labels(**self._labels)
        self.registry.register(_EngineState(service, model_name))
        service.on_finish = self.finished

    def finished(self, output: RequestOutput) -> None:
        self._success.labels(**self._labels, finished_reason=output.finish_reason).inc()
        done = output.metrics
        self._compressed.inc(done.compressed)
        self._observe("vllm:e2e_request_latency_seconds", done.finished_s - done.arrival_s)
        self._observe("vllm:request_prompt_tokens", done.prompt_tokens)
        self._observe("vllm:request_generation_tokens", done.output_tokens)
        if done.first_token_s is None:
            return
        self._observe("vllm:time_to_first_token_seconds", done.first_token_s - done.arrival_s)
        self._observe("vllm:request_queue_time_seconds", done.scheduled_s - done.arrival_s)
        self._observe("vllm:request_prefill_time_seconds", done.first_token_s - done.scheduled_s)
        self._observe("vllm:request_decode_time_seconds", done.token_times_s[-1] - done.first_token_s)
        for before, after in zip(done.token_times_s, done.token_times_s[1:], strict=False):
            self._observe("vllm:inter_token_latency_seconds", after - before)
        if done.output_tokens > 1:
            mean = (done.token_times_s[-1] - done.first_token_s) / (done.output_tokens - 1)
            self._observe("vllm:request_time_per_output_token_seconds", mean)

    def refused(self, status: int) -> None:
        self._refused.labels(**self._labels, status=str(status)).inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def _observe(self, name: str, value: float) -> None:
        self._histograms[name].observe(value)


class _EngineState:
    """A Prometheus collector: gauges and counters that the engine keeps itself."""

    def __init__(self, service: EngineService, model_name: str) -> None:
        self._service, self._model = service, model_name

    def collect(self) -> Iterator[Metric]:
        load, stats = self._service.load, self._service.stats
        for name, text, value in (
            ("vllm:num_requests_running", "Requests in the engine's batch.", load.running),
            ("vllm:num_requests_waiting", "Requests that wait to be admitted.", load.waiting),
            ("vllm:kv_cache_usage_perc", "Pages in use, 1 is all.", load.pages_used / load.num_pages),
        ):
            yield self._with(GaugeMetricFamily(name, text, labels=["model_name"]), value)
        for name, text, value in (
            ("vllm:num_preemptions", "Requests put back to be computed again.", stats.preemptions),
            ("vllm:prompt_tokens", "Prompt tokens computed.", stats.prefill_tokens),
            ("vllm:generation_tokens", "Decode tokens computed.", stats.decode_tokens),
            ("fastcache:pages_freed", "Pages that compression gave back.", stats.pages_freed),
        ):
            yield self._with(CounterMetricFamily(name, text, labels=["model_name"]), value)

    def _with(self, family: Metric, value: float) -> Metric:
        family.add_metric([self._model], value)
        return family
