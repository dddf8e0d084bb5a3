"""Open-loop load on an engine: requests arrive when they arrive, whether or not the ones before are done."""
