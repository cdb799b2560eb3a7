"""LitData's optimised folders, as its writer writes them (a slow test compares the two)."""

import json
import struct
from pathlib import Path

BYTES = {"int": lambda v: struct.pack("<q", v), "str": str.encode, "jpeg": bytes, "bytes": bytes}
BYTES |= {"bool": lambda v: b"\x01" if v else b"\x00", "pickle": bytes, "pil": bytes}


def write_litdata(
    folder: Path, samples: list[dict], formats: dict[str, str], chunk_size: int = 8, **config
) -> Path:
    """Write `index.json` and chunks. formats: of each column."""
    folder.mkdir(parents=True, exist_ok=True)
    chunks = []
    for start in range(0, len(samples), chunk_size):
        some = samples[start : start + chunk_size]
        write = _as_arrow if set(formats.values()) <= {"int", "str", "bool", "bytes"} else _plain
        data = write(some, formats)
        name = f"chunk-0-{len(chunks)}.bin"
        (folder / name).write_bytes(data)
        chunks.append({"chunk_bytes": len(data), "chunk_size": len(some), "filename": name})
    leaf = {"type": None, "context": None, "children_spec": []}
    spec = {
        "type": "builtins.dict",
        "context": json.dumps(list(formats)),
        "children_spec": [leaf] * len(formats),
    }
    about = {
        "chunk_size": chunk_size,
        "compression": None,
        "data_format": list(formats.values()),
        "data_spec": json.dumps([1, spec]),
        "encryption": None,
        "item_loader": "PyTreeLoader",
    }
    (folder / "index.json").write_text(json.dumps({"chunks": chunks, "config": about | config}))
    return folder


def _plain(samples: list[dict], formats: dict[str, str]) -> bytes:
    bodies = []
    for sample in samples:
        parts = [BYTES[kind](sample[name]) for name, kind in formats.items()]
        bodies.append(struct.pack(f"<{len(parts)}I", *map(len, parts)) + b"".join(parts))
    begins = [4 + 4 * (len(samples) + 1)]
    for body in bodies:
        begins.append(begins[-1] + len(body))
    return struct.pack(f"<{len(begins) + 1}I", len(samples), *begins) + b"".join(bodies)


def _as_arrow(samples: list[dict], formats: dict[str, str]) -> bytes:
    import pyarrow

    table = pyarrow.Table.from_pylist(samples)
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    rows = sink.getvalue().to_pybytes()
    begin = 4 + 4 * (len(samples) + 1)
    head = struct.pack(f"<{len(samples) + 2}I", len(samples), *[begin] * (len(samples) + 1))
    return head + rows + struct.pack("<I", len(rows)) + b"LDARW01\0"
