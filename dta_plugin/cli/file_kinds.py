"""Files and folders that hold no rollouts: what each is, by its first bytes or its name, and what to do instead."""

from __future__ import annotations

import shlex
from pathlib import Path

READ = "JSONL, JSON, Parquet or Arrow"
_WEIGHTS = f"the weights of a model. Expected a file of rollouts ({READ}); to check a model: dta doctor --model FOLDER"
_TABLE = (
    "Expected JSON, a row per line. Run: python -c 'import csv, json, sys; [print(json.dumps(row)) for row in "
    "csv.DictReader(sys.stdin{delimiter})]' < {name} > rollouts.jsonl; inspect that"
)
_CONFIGS = {"config.json": b'"model_type"', "adapter_config.json": b'"peft_type"'}  # a model's, and what is in it

# The first bytes of a file -> what it is.
_BEGINNINGS: dict[bytes, str] = {
    b"version https://git-lfs": "a git-lfs pointer, not the file itself. Run: git lfs pull",
    b"\x28\xb5\x2f\xfd": "compressed by zstd. Run: zstd -d",
    b"\x04\x22\x4d\x18": "compressed by lz4. Run: lz4 -d",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive. Expected what is in it; run: 7z x",
    b"\x93NUMPY": f"a NumPy file. Expected {READ}",
    b"GGUF": f"a GGUF file, {_WEIGHTS}",
    b"\x89PNG": f"a PNG picture. Expected a file of rollouts ({READ})",
    b"\xff\xd8\xff": f"a JPEG picture. Expected a file of rollouts ({READ})",
    b"GIF8": f"a GIF picture. Expected a file of rollouts ({READ})",
    b"RIFF": f"a RIFF file (WebP, WAV). Expected a file of rollouts ({READ})",
    b"%PDF": f"a PDF file. Expected a file of rollouts ({READ})",
    b"\x7fELF": f"a program. Expected a file of rollouts ({READ})",
    b"SQLite format 3": f"an SQLite database. Expected {READ}; export its table of rollouts",
    b"<!doctype html": f"an HTML page, not what was to be downloaded? Expected {READ}",
    b"<html": f"an HTML page, not what was to be downloaded? Expected {READ}",
    b"\x89HDF": f"an HDF5 file. Expected {READ}",
    b"ORC": f"an ORC file. Expected {READ}; pyarrow converts it to Parquet",
    b"Obj\x01": f"an Avro file. Expected {READ}",
}
_PICKLE = f"a pickle, which may hold weights or tensors. Expected {READ}; torch.load and json.dump write rollouts so"
_ZIP = "a zip archive. Expected what is in it; run: unzip"
_PYTORCH = f"a file of torch.save, {_WEIGHTS}; rollouts in it: torch.load them and write a JSON object per line"


def kind_refused(name: str, head: bytes) -> str | None:
    """What a file is ("a PNG picture. Expected ..") if it holds no rollouts; head: its first bytes, 512 or all."""
    suffix = Path(name).suffix.lower()
    if head[8:9] == b"{" and head[4:8] == bytes(4):  # the length of the header, then the header
        return f"a safetensors file, {_WEIGHTS}"
    if head.startswith(b"PK\x03\x04"):
        return _PYTORCH if suffix in (".pt", ".pth", ".bin", ".ckpt") or b"/data.pkl" in head else _ZIP
    if head.startswith(b"\x80"):
        return _PICKLE
    if head[257:262] == b"ustar":
        return "a tar archive. Expected what is in it; run: tar -xf"
    if suffix in (".csv", ".tsv") and not head.lstrip(b" \t\r\n\xef\xbb\xbf").startswith((b"{", b"[")):
        delimiter = ', delimiter="\\t"' if suffix == ".tsv" else ""
        return f"a {suffix[1:].upper()} table. {_TABLE.format(delimiter=delimiter, name=shlex.quote(name))}"
    if suffix in (".yaml", ".yml"):
        return f"a YAML file. Expected a file of rollouts ({READ})"
    lowered = head.lower()
    return next((what for magic, what in _BEGINNINGS.items() if lowered.startswith(magic.lower())), None)


def folder_refused(folder: Path) -> str | None:
    """What a folder is if it holds a model rather than rollouts."""
    for name, sign in _CONFIGS.items():
        if (folder / name).is_file() and sign in (folder / name).read_bytes():
            expected = (
                f"Expected rollouts: a file or folder of {READ}; to check this model: dta doctor --model {folder}"
            )
            return f"the folder of a model ({name}). {expected}"
    return None
