"""Names of the files that an export has of its own."""

MANIFEST = "megatron_quant_manifest.json"
"""Of what an export is made, and the digest of every tensor."""
