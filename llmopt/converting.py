"""Another file format for the same codes: exact or refused, proven equal before it is visible."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import llmopt
from llmopt.checkpoint.artifact import Artifact, check_output, open_artifact
from llmopt.checkpoint.companions import Companions, copy_companions, plan_companions
from llmopt.checkpoint.journal import BlockEntry
from llmopt.checkpoint.publish import PublishResult, publish
from llmopt.checkpoint.reader import open_checkpoint
from llmopt.checkpoint.shards import write_index, write_shard
from llmopt.conversion import Conversion, in_scheme, plan_conversion
from llmopt.errors import BadInputError, Outcome, RoundTripError
from llmopt.formats.dequantized import DequantizedSource
from llmopt.naming import config_names, ignored_names
from llmopt.progress import Progress, silent
from llmopt.report.conversion import ConversionReport, ConvertedFrom, write_conversion
from llmopt.report.integrity import hash_files
from llmopt.report.schema import CompanionFiles
from llmopt.roundtrip import check_round_trip
from llmopt.writing import write_config

_DEFECT = "report this as a defect of llmopt"


@dataclass(frozen=True, slots=True)
class _Equality:
    """The verdict on a conversion: ``pass`` if every tensor is equal."""

    outcome: Outcome


def convert(
    directory: Path | str,
    to: str,
    output: Path | str,
    *,
    checkpoint_format: str | None = None,
    consumers: Sequence[str] = (),
    tensor_parallel_size: int = 1,
    resume: bool = False,
    progress: Progress = silent,
) -> PublishResult:
    """Write a quantized checkpoint in another format, without quantizing anew.

    Args:
        directory: a checkpoint in any format that llmopt reads, from any tool; it is only read.
        to: the format to write.
        output: folder that will appear; it must not exist or be empty.
        checkpoint_format: of ``gptq``: ``gptq`` or ``gptq_v2``.
        consumers: who must be able to open it; without a word all that can.
        tensor_parallel_size: ranks of the consumers.
        resume: go on where an interrupted conversion for the same output stopped.
        progress: told of every tensor.

    Raises:
        ContractError: the target cannot hold the source exactly, or a consumer would refuse it.
        BadInputError: a source that cannot be read, an output in the way.
        RoundTripError: what was written is not equal; it is in quarantine, with its report.
    """
    check_output(Path(output), resume=resume)
    if Path(output).resolve().is_relative_to(Path(directory).resolve()):
        raise BadInputError(
            f"the output {output} lies inside the source {directory}, which is only read",
            "choose an output directory outside it",
        )
    plan = plan_conversion(
        directory,
        to,
        checkpoint_format=checkpoint_format,
        consumers=consumers,
        tensor_parallel_size=tensor_parallel_size,
        progress=progress,
    )
    contents = {
        "llmopt": llmopt.__version__,
        "source": plan.sha256,
        "format": f"{plan.form.name} {plan.form.checkpoint_format}",
    }
    with open_artifact(
        Path(output), contents, resume=resume, needed_bytes=_needed_bytes(plan)
    ) as artifact:
        companions = _write(plan, artifact, progress)
        try:
            _check_equal(plan, artifact.directory, progress)
        except (RoundTripError, BadInputError) as error:
            _report(plan, artifact, companions, error.what)
            place = publish(artifact, _Equality("fail")).path
            raise RoundTripError(f"{error.what}; it is in {place}", error.remedy) from error
        _report(plan, artifact, companions, None)
        return publish(artifact, _Equality("pass"))


def _needed_bytes(plan: Conversion) -> int:
    """Disk space of the output, its scales counted as the widest there are."""
    tensors = sum(plan.reader.info(name).num_bytes for name in plan.copied)
    for module, scheme in plan.schemes.items():
        info = plan.source.info(f"{module}.weight")
        rows, columns = info.shape
        bits = plan.form.bits_per_weight(scheme, (rows, columns), torch.float32)
        tensors += int(info.num_parameters * bits / 8)
    return tensors + plan_companions(plan.reader.path).num_bytes


def _write(plan: Conversion, artifact: Artifact, progress: Progress) -> Companions:
    """Shard for shard, under the source's file names; a weight goes where its codes were."""
    shards = list(plan.reader.shards)
    first = len(artifact.journal.blocks)
    for index, file in enumerate(shards[first:], start=first):
        progress("convert", index, len(shards))
        tensors: dict[str, Tensor] = {}
        digests: dict[str, str] = {}
        for name in plan.reader.shards[file]:
            part = plan.source.form.weight_name(name)
            if part is None:
                tensors[name] = plan.reader.read(name)
            elif part[1]:
                module = part[0]
                weight = in_scheme(plan.source.read_quantized(module), plan.schemes[module])
                tensors |= plan.form.pack(module, weight)
                digests[module] = plan.codes[module]
        shard = write_shard(artifact.directory / file, tensors)
        artifact.journal.append(BlockEntry(index=index, shard=shard, digests=digests))
    progress("convert", len(shards), len(shards))
    write_index(artifact.directory, [entry.shard for entry in artifact.journal.blocks])
    schemes = {name: scheme for name, scheme in plan.assigned.items() if scheme is not None}
    kept = [name for name, scheme in plan.assigned.items() if scheme is None]
    ignored = ignored_names(plan.source, plan.structure, kept, patterns=plan.form.takes_patterns)
    section = plan.form.config(config_names(plan.structure, schemes), ignored)
    write_config(artifact.directory, plan.source.config, plan.form, section)
    return copy_companions(plan.reader.path, artifact.directory)


def _check_equal(plan: Conversion, directory: Path, progress: Progress) -> None:
    """Codes by the independent decoder, all other tensors by their bytes, schemes by the config.

    Raises:
        RoundTripError: naming what differs.
        BadInputError: the output cannot even be opened.
    """
    check_round_trip(directory, plan.codes, plan.schemes, plan.copied, progress)
    written = DequantizedSource(open_checkpoint(directory))
    for module, scheme in plan.schemes.items():
        before, after = plan.source.read_quantized(module), written.read_quantized(module)
        if in_scheme(after, scheme).digest() != plan.codes[module]:
            raise RoundTripError(f"{module} reads as another weight", _DEFECT)
        if after.scales.dtype != before.scales.dtype:
            raise RoundTripError(f"{module} has scales of another element type", _DEFECT)


def _report(
    plan: Conversion, artifact: Artifact, companions: Companions, different: str | None
) -> None:
    source = plan.source
    report = ConversionReport(
        llmopt_version=llmopt.__version__,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        name=artifact.output.name,
        source=ConvertedFrom(
            name=plan.reader.path.resolve().name,
            format=source.form.name,
            checkpoint_format=source.form.checkpoint_format,
            sha256=plan.sha256,
            gated=plan.gated,
        ),
        format=plan.form.name,
        checkpoint_format=plan.form.checkpoint_format,
        schemes=dict(Counter(scheme.label for scheme in plan.schemes.values())),
        consumers=plan.consumers,
        companions=CompanionFiles(carried=companions.copied, left_out=companions.left_out),
        num_quantized=len(plan.codes),
        num_copied=len(plan.copied),
        different=different,
        outcome="pass" if different is None else "fail",
        files=hash_files(artifact.directory),
    )
    write_conversion(artifact.directory, report)
