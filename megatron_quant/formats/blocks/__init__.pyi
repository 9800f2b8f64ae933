from .chunks import as_rows as as_rows
from .chunks import chunks_to_read as chunks_to_read
from .chunks import row_chunks as row_chunks
from .region import Edge as Edge
from .region import Region as Region
from .region import edge_of as edge_of
from .region import grids as grids
from .region import put_together as put_together
from .region import whole_matrix as whole_matrix
from .rows import Rows as Rows
from .rows import block_index as block_index
from .rows import check_storable as check_storable
from .rows import flat_stat as flat_stat
from .rows import row_scale as row_scale
from .rows import rows_of as rows_of
from .rows import rows_on as rows_on
from .rows import scale_fields as scale_fields
from .stat import block_stat as block_stat
from .stat import cuts as cuts

__all__ = [
    "Edge",
    "Region",
    "Rows",
    "as_rows",
    "block_index",
    "block_stat",
    "check_storable",
    "chunks_to_read",
    "cuts",
    "edge_of",
    "flat_stat",
    "grids",
    "put_together",
    "row_chunks",
    "row_scale",
    "rows_of",
    "rows_on",
    "scale_fields",
    "whole_matrix",
]
