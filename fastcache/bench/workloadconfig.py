"""What a workload is: which requests are sent, by name and lengths. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from fastcache.config import StrictConfig, one_of, positive_int, require

WORKLOADS = ("synthetic-long", "english-prose", "light-dataset", "heavy-trace")


@dataclass(frozen=True)
class WorkloadConfig(StrictConfig):
    """Which requests are sent. Lengths are in tokens and are what was asked for; `workload.fit` clips them.

    `num_batches` batches run one after another, each of the cell's `batch_size` requests at once.
    `token` (synthetic-long) repeats one text; `dialogue` fills prompts with a two-speaker pattern.
    `dataset_dir` (light-dataset) holds json, jsonl or csv prompt sets; prompts of `min_prompt_tokens` to
    `context` tokens are used. `trace` (heavy-trace) is a CSV with the columns TIMESTAMP, ContextTokens,
    GeneratedTokens; rows of at least `min_prompt_tokens` and at most `output` are replayed in order.
    `min_context`, `min_output` (synthetic-long): lengths are drawn from there up to `context` and `output`, seeded, the
    same in every round. `requests`: how many are sent at once, where more than the `batch_size` that runs at once.
    `images` seeded pictures go with each request, for a model that reads pictures; their tokens count in `context`.
    """

    name: str
    context: int = 3072
    output: int = 512
    num_batches: int = 1
    token: str | None = None
    dialogue: bool = False
    dataset_dir: str | None = None
    trace: str | None = None
    min_prompt_tokens: int | None = None
    images: int = 0
    min_context: int | None = None
    min_output: int | None = None
    requests: int | None = None

    def __post_init__(self) -> None:
        one_of("workload", self.name, WORKLOADS)
        for name in ("context", "output", "num_batches"):
            positive_int(f"workload {self.name}: {name}", getattr(self, name))
        require(
            isinstance(self.images, int) and not isinstance(self.images, bool) and self.images >= 0,
            f"workload {self.name}: images is {self.images!r}; allowed is 0 or a positive integer.",
        )
        for name in ("min_prompt_tokens", "min_context", "min_output", "requests"):
            if getattr(self, name) is not None:
                positive_int(f"workload {self.name}: {name}", getattr(self, name))
        for least, most in (("min_context", "context"), ("min_output", "output")):
            low, high = getattr(self, least), getattr(self, most)
            require(
                low is None or (low <= high and self.name == "synthetic-long"),
                f"workload {self.name}: {least} is {low!r}; allowed is 1 to {most} ({high}), in 'synthetic-long'.",
            )
        require(
            self.name == "synthetic-long" or not (self.token or self.dialogue),
            f"workload {self.name!r} takes no `token` or `dialogue`; these belong to 'synthetic-long'.",
        )
        require(not (self.token and self.dialogue), "`token` and `dialogue` were both given; give one.")
        require(self.token != "", "`token` is empty; leave it out for distinct seeded prompts.")
        require(
            self.name != "light-dataset" or self.dataset_dir is not None,
            "workload 'light-dataset' needs `dataset_dir` (--dataset-dir): a folder of json, jsonl, csv.",
        )
        require(
            self.name != "heavy-trace" or self.trace is not None,
            "workload 'heavy-trace' needs `trace` (--trace-conv): a CSV with the columns TIMESTAMP, "
            "ContextTokens, GeneratedTokens.",
        )

    @property
    def needs_tokenizer(self) -> bool:
        """Text that must become tokens; seeded token ids and repeated tokens need only a vocabulary size."""
        return self.name in ("english-prose", "light-dataset") or self.dialogue
