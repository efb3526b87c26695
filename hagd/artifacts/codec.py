"""Frozen dataclass records on disk: tensors in `tensors.safetensors`, everything else in `record.json`.

The JSON describes itself: a scalar or a list stands for itself, any other value is an object with one key,
`$tensor`, `$array`, `$tuple`, `$dict`, `$float` (not finite) or `$record`. Classes of nested records are taken
from the annotations of the record that is loaded, never from the file, so a file cannot choose what code runs.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hagd.artifacts.keys import canonical_json
from hagd.errors import ArtifactError

FORMAT = 1
"""Layout of the files; raised when it changes."""

RECORD_FILE = "record.json"
TENSOR_FILE = "tensors.safetensors"

R = TypeVar("R")


class DamagedArtifactError(ArtifactError):
    """A stored result is incomplete, damaged, of another version, or another record than expected."""

    def __str__(self) -> str:
        return f"{self.problem}; delete this folder and run again"

    @property
    def problem(self) -> str:
        """The message without its advice."""
        return super().__str__()


def save_record(record: Any, folder: Path) -> None:
    """Write a frozen dataclass to `folder` (made if missing), exactly: `load_record` gives the same bits.

    Fields may hold tensors, NumPy arrays, int, float, str, bool, None, nested frozen dataclasses, and tuples,
    lists and dicts (str keys) of those. Tensors are stored detached and come back on the CPU.

    Raises:
        ArtifactError: a field holds something else; names the field.
        OSError: the folder cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    content = _encode(record, "", tensors)
    folder.mkdir(parents=True, exist_ok=True)
    header: dict[str, Any] = {"format": FORMAT, "record": type(record).__name__, "tensors_sha256": None}
    if tensors:
        _save_tensors(tensors, folder / TENSOR_FILE)
        header["tensors_sha256"] = _file_sha256(folder / TENSOR_FILE)
    header["content_sha256"] = _text_sha256(content)
    (folder / RECORD_FILE).write_text(json.dumps({**header, "content": content}, indent=1))


def load_record(cls: type[R], folder: Path) -> R:
    """Read what `save_record` wrote. Fields with default None may be missing: older files lack them.

    Raises:
        DamagedArtifactError: files are missing, truncated or damaged, were written by another version, or hold another
            record than `cls`.
        OSError: the files cannot be read (permissions, failing disk).
    """
    try:
        stored = json.loads((folder / RECORD_FILE).read_text())
        _check_header(stored, cls)
        tensors: dict[str, Tensor] = {}
        if stored["tensors_sha256"] is not None:
            if _file_sha256(folder / TENSOR_FILE) != stored["tensors_sha256"]:
                raise ValueError(f"{TENSOR_FILE} does not match its checksum")
            tensors = load_file(folder / TENSOR_FILE)
        record: R = _decode(stored["content"], cls, tensors)
        return record
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _damaged(cls, folder, f"{error.filename} is missing") from error
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise _damaged(cls, folder, f"{type(error).__name__}: {error}") from error


def _check_header(stored: dict[str, Any], cls: type) -> None:
    if stored["format"] != FORMAT:
        raise ValueError(f"expected format {FORMAT}, found {stored['format']}")
    if stored["record"] != cls.__name__:
        raise ValueError(f"expected a {cls.__name__}, found a {stored['record']}")
    if _text_sha256(stored["content"]) != stored["content_sha256"]:
        raise ValueError(f"{RECORD_FILE} does not match its checksum")


def _damaged(cls: type, folder: Path, reason: str) -> DamagedArtifactError:
    return DamagedArtifactError(f"{folder}: expected an intact {cls.__name__}, found {reason}")


def _encode(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """JSON for `value`; tensors go into `tensors` under dotted names."""
    if value is None or isinstance(value, bool | int | float | str | np.generic):
        return _encode_scalar(value, name)
    if isinstance(value, Tensor):
        return {"$tensor": _add_tensor(value.detach(), name, tensors)}
    if isinstance(value, np.ndarray):
        return {"$array": _add_tensor(_from_array(value, name), name, tensors)}
    if isinstance(value, list):
        return [_encode(item, _join(name, i), tensors) for i, item in enumerate(value)]
    if type(value) is tuple:
        return {"$tuple": [_encode(item, _join(name, i), tensors) for i, item in enumerate(value)]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"$dict": {key: _encode(item, _join(name, key), tensors) for key, item in value.items()}}
    if is_dataclass(value) and not isinstance(value, type):
        content = {
            field.name: _encode(getattr(value, field.name), _join(name, field.name), tensors)
            for field in fields(value)
            if field.init
        }
        return {"$record": type(value).__name__, "fields": content}
    raise _unstorable(name, f"a {type(value).__name__}")


def _encode_scalar(value: Any, name: str) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if type(value) not in (type(None), bool, int, float, str):  # an Enum member would come back as its value
        raise _unstorable(name, f"a {type(value).__name__}")
    if isinstance(value, float) and not np.isfinite(value):
        return {"$float": str(value)}
    return value


def _join(name: str, part: object) -> str:
    text = str(part).encode("ascii", "backslashreplace").decode()
    return f"{name}.{text}" if name else text


def _from_array(array: np.ndarray[Any, Any], name: str) -> Tensor:
    try:
        return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))
    except TypeError:
        raise _unstorable(name, f"an array of {array.dtype}") from None


def _add_tensor(tensor: Tensor, name: str, tensors: dict[str, Tensor]) -> str:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.dtype in (torch.complex32, torch.complex128):
        raise _unstorable(name, f"a tensor of {tensor.layout}, {tensor.dtype}")
    while name in tensors:  # keys with dots can meet: {"a.b": …} and {"a": {"b": …}}
        name += "'"
    tensors[name] = tensor
    return name


def _unstorable(name: str, found: str) -> ArtifactError:
    return ArtifactError(
        f"record field {name or '(top)'}: expected a tensor, an array, a number, text, None, a dataclass, or a tuple, "
        f"list or dict (str keys) of those, found {found}; change the record's field"
    )


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """As safetensors, which takes only contiguous tensors that share no memory: views are copied."""
    own: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.resolve_conj().resolve_neg().cpu().contiguous()
        storage = plain.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != plain.numel() * plain.element_size():
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        own[name] = plain
    try:
        save_file(own, path)
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), str(error), str(path)) from error


def _decode(node: Any, annotation: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(node, list):
        return [_decode(item, annotation, tensors) for item in node]
    if not isinstance(node, dict):
        return node
    match node:
        case {"$tensor": name}:
            return tensors[name]
        case {"$array": name}:
            return tensors[name].numpy()
        case {"$float": text}:
            return float(text)
        case {"$tuple": items}:
            return tuple(_decode(item, annotation, tensors) for item in items)
        case {"$dict": items}:
            return {key: _decode(item, annotation, tensors) for key, item in items.items()}
        case _:
            return _decode_record(node["$record"], node["fields"], annotation, tensors)


def _decode_record(name: str, content: dict[str, Any], annotation: Any, tensors: dict[str, Tensor]) -> Any:
    known = {cls.__name__: cls for cls in _dataclasses(annotation)}
    if name not in known:
        raise ValueError(f"expected one of {sorted(known)}, found a {name}")
    cls = known[name]
    expected = [field.name for field in fields(cls) if field.init]
    required = {field.name for field in fields(cls) if field.init and field.default is not None}
    if not required <= content.keys() <= set(expected):
        raise ValueError(f"expected the fields {expected} of {name}, found {list(content)}")
    hints = _hints(cls)
    return cls(**{field: _decode(node, hints[field], tensors) for field, node in content.items()})


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _dataclasses(annotation: Any) -> Iterator[Any]:
    """Every dataclass that occurs in an annotation, at any depth of unions and containers."""
    origin = get_origin(annotation) or annotation
    if isinstance(origin, type) and is_dataclass(origin):
        yield origin
    for argument in get_args(annotation):
        yield from _dataclasses(argument)


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _text_sha256(content: Any) -> str:
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()
