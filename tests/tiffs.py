"""TIFFs of any depth and meaning, as no library of the tests writes them."""

import struct


def tiff(values, order="<", *, photometric=1, extra=(), **tags):
    """A TIFF of (rows, columns[, samples]) values as they are, uncompressed."""
    values = values if values.ndim == 3 else values[..., None]
    rows, columns, samples = values.shape
    sample_format = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    bits = values.dtype.itemsize * 8
    entries = {256: (columns,), 257: (rows,), 258: (bits,) * samples, 259: (1,),
               262: (photometric,), 273: (8,), 277: (samples,), 278: (rows,), 279: (len(data),),
               339: (sample_format,) * samples}  # fmt: skip
    if extra:
        entries[338] = extra
    entries |= {int(key[1:]): value for key, value in tags.items()}
    at = 8 + len(data)
    after = at + 2 + 12 * len(entries) + 4
    directory, more = struct.pack(order + "H", len(entries)), b""
    for tag, value in sorted(entries.items()):
        packed = struct.pack(f"{order}{len(value)}L", *value)
        if len(value) > 1:
            more_at = struct.pack(order + "L", after + len(more))
            more, packed = more + packed, more_at
        directory += struct.pack(order + "HHL", tag, 4, len(value)) + packed
    magic = b"II*\0" if order == "<" else b"MM\0*"
    return magic + struct.pack(order + "L", at) + data + directory + bytes(4) + more
