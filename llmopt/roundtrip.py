"""After writing: the artifact is read back and compared with what was calibrated, code for code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from llmopt.checkpoint.reader import open_checkpoint
from llmopt.checkpoint.scan import tensor_digest
from llmopt.errors import RoundTripError
from llmopt.formats.independent import RawShards, find_decoder
from llmopt.formats.independent.gguf import GGUFDecoder
from llmopt.progress import Progress
from llmopt.quantization.scheme import Scheme
from llmopt.report.schema import RoundTrip

_DEFECT = "check the disk; if it is sound, report this as a defect of llmopt"


def check_round_trip(
    directory: Path,
    solved: Mapping[str, str],
    schemes: Mapping[str, Scheme],
    copied: Mapping[str, str],
    progress: Progress,
) -> RoundTrip:
    """Decode every packed weight independently of the packer, and hash every copied tensor.

    Args:
        directory: the staged artifact.
        solved: digest of each quantized tensor as the solver gave it, by module name.
        schemes: by the same names.
        copied: SHA-256 of each copied tensor as the source has it, by tensor name.
        progress: told of each tensor.

    Raises:
        RoundTripError: naming what differs; nothing is published then.
    """
    reader = open_checkpoint(directory)
    shards = RawShards(sorted({reader.info(name).file for name in reader.names}))
    section = reader.config.get("quantization_config")
    decoder = find_decoder(section if isinstance(section, dict) else {})
    total = len(solved) + len(copied)
    different: list[str] = []
    missing = set(solved).symmetric_difference(decoder.packed_modules(shards))
    missing |= set(copied) - set(reader.names)
    if missing:
        raise _mismatch(sorted(missing))
    for done, (module, digest) in enumerate(solved.items()):
        progress("read back", done, total)
        if decoder.decode(shards, module, schemes[module]).digest() != digest:
            different.append(module)
    for done, (name, digest) in enumerate(copied.items(), start=len(solved)):
        progress("read back", done, total)
        if tensor_digest(reader.read(name)) != digest:
            different.append(name)
    progress("read back", total, total)
    if different:
        raise _mismatch(different)
    return RoundTrip(num_tensors=total, num_mismatches=0)


def check_gguf_round_trip(path: Path, solved: Mapping[str, str], progress: Progress) -> RoundTrip:
    """Decode every tensor of a GGUF file by the ``gguf`` package, which shares no code with ours.

    Args:
        path: the staged file.
        solved: digest of each tensor's values, rows in the checkpoint's order, by its name there.
        progress: told of each tensor.

    Raises:
        RoundTripError: naming what differs; nothing is published then.
    """
    try:
        decoder = GGUFDecoder(path)
    except (ValueError, OSError) as error:
        raise RoundTripError(f"the gguf package does not read {path}: {error}", _DEFECT) from error
    missing = decoder.names.symmetric_difference(solved)
    if missing:
        raise _mismatch(sorted(missing))
    different = []
    for done, (name, digest) in enumerate(solved.items()):
        progress("read back", done, len(solved))
        try:
            found = decoder.digest(name)
        except ValueError as error:
            raise RoundTripError(f"{name} of {path} cannot be read: {error}", _DEFECT) from error
        if found != digest:
            different.append(name)
    progress("read back", len(solved), len(solved))
    if different:
        raise _mismatch(different)
    return RoundTrip(num_tensors=len(solved), num_mismatches=0)


def _mismatch(names: list[str]) -> RoundTripError:
    return RoundTripError(
        f"{len(names)} tensors on disk are not what was calibrated: {', '.join(names[:5])}",
        _DEFECT,
    )
