from .box_bytes import as_bytes as as_bytes
from .box_bytes import hashed_on_disk as hashed_on_disk
from .box_bytes import leaves_of as leaves_of
from .box_bytes import placed as placed
from .direct_io import OutputFile as OutputFile
from .direct_io import StagingBuffer as StagingBuffer
from .disk import EXPORT_DIR as EXPORT_DIR
from .disk import UNSUPPORTED as UNSUPPORTED
from .disk import allocate as allocate
from .disk import append as append
from .disk import explained as explained
from .disk import forget as forget
from .disk import overlap as overlap
from .disk import read_source as read_source
from .disk import sync_directory as sync_directory
from .disk import write_at as write_at
from .disk import write_file as write_file
from .hub import read_config as read_config
from .hub import read_object as read_object
from .hub import resolve_source as resolve_source
from .index import index_problems as index_problems
from .mapped import MappedFiles as MappedFiles
from .memory import give_back as give_back
from .names import MANIFEST as MANIFEST
from .safetensors_header import INDEX as INDEX
from .safetensors_header import WEIGHTS as WEIGHTS
from .safetensors_header import Draft as Draft
from .safetensors_header import OutFile as OutFile
from .safetensors_header import TensorEntry as TensorEntry
from .safetensors_header import UnknownDtype as UnknownDtype
from .safetensors_header import entries_of as entries_of
from .safetensors_header import lay_out as lay_out
from .safetensors_header import read_header as read_header
from .tensor_digests import TensorDigests as TensorDigests
from .tensor_digests import Written as Written
from .tree_digest import ABOUT as ABOUT
from .tree_digest import DIGEST_BYTES as DIGEST_BYTES
from .tree_digest import hashed as hashed

__all__ = [
    "ABOUT",
    "DIGEST_BYTES",
    "EXPORT_DIR",
    "INDEX",
    "MANIFEST",
    "UNSUPPORTED",
    "WEIGHTS",
    "Draft",
    "MappedFiles",
    "OutFile",
    "OutputFile",
    "StagingBuffer",
    "TensorDigests",
    "TensorEntry",
    "UnknownDtype",
    "Written",
    "allocate",
    "append",
    "as_bytes",
    "entries_of",
    "explained",
    "forget",
    "give_back",
    "hashed",
    "hashed_on_disk",
    "index_problems",
    "lay_out",
    "leaves_of",
    "overlap",
    "placed",
    "read_config",
    "read_header",
    "read_object",
    "read_source",
    "resolve_source",
    "sync_directory",
    "write_at",
    "write_file",
]
