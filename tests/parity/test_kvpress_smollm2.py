"""Every method keeps what kvpress keeps on SmolLM2-135M reading English prose: 30 layers, 3 KV heads, G 3."""

from __future__ import annotations

from pydoc_data.topics import topics

import pytest
from kvpress_oracle import COMPARED, RATIOS, differences, load_model, record_prefill
from tokenizers import Tokenizer

from fastcache.compression.registry import create
from fastcache.config import CompressionConfig

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=(320, 1024))
def recorded(request, smollm2):
    """All layers of one prefill of the Python language reference: one transformers run for all methods."""
    tokenizer = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    token_ids = tokenizer.encode(topics["objects"]).ids[: request.param]
    assert len(token_ids) == request.param
    return record_prefill(load_model(smollm2), token_ids)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("name", COMPARED)
def test_kept_sets_equal_kvpress(recorded, name, ratio):
    method = create(CompressionConfig(method=name))
    found = {layer: differences(method, record, ratio) for layer, record in enumerate(recorded)}
    assert not any(found.values()), {layer: lines for layer, lines in found.items() if lines}
