"""Names of the files that an export has of its own."""

MANIFEST = "megatron_quant_manifest.json"
"""File that names the inputs of an export, and the digest of every tensor."""
