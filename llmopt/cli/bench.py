"""``llmopt bench``: how fast, how large, how good, beside the peers and the machine's floor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmopt.cli.console import errors, output, progress_bars

app = typer.Typer(no_args_is_help=True, help="Benchmarks beside the peers and the floor.")


@app.command()
def quantize(
    destination: Annotated[Path, typer.Option("--output", "-o", help="JSON file to write.")],
    peer: Annotated[
        list[str] | None,
        typer.Option(help="llm-compressor, gptqmodel; may be repeated. [default: all]"),
    ] = None,
    alone: Annotated[bool, typer.Option("--alone", help="Measure llmopt without peers.")] = False,
    method: Annotated[
        list[str] | None, typer.Option(help="gptq or awq; may be repeated. [default: gptq]")
    ] = None,
    recipe: Annotated[
        list[str] | None, typer.Option(help="Measure llmopt by this recipe too.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Folder of a checkpoint. [default: the benchmark's own]")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration blocks.")] = 128,
    length: Annotated[int, typer.Option(min=16, help="Tokens of each.")] = 512,
    threads: Annotated[int, typer.Option(min=1, help="Of every quantizer.")] = 2,
    repeats: Annotated[int, typer.Option(min=1, help="Runs a row.")] = 1,
    held_out: Annotated[int, typer.Option(min=512, help="Tokens to measure on.")] = 65_536,
    markdown: Annotated[bool, typer.Option(help="Print the table as Markdown.")] = False,
) -> None:
    """Quantize one model by llmopt and its peers; exit 3 if one failed, 4 if one is unavailable.

    Peers are installed once, in environments of their own in llmopt's cache.
    """
    from llmopt.bench.peers import PEERS, check_method, find_peers
    from llmopt.bench.quantize import BenchOptions, bench_quantize, check_output_file, exit_code
    from llmopt.bench.table import markdown_table, render_table

    check_output_file(destination)
    peers = () if alone else tuple(find_peers(peer or list(PEERS)))
    methods = tuple(check_method(name) for name in method or ["gptq"])
    model = model or _own_model()
    options = BenchOptions(
        model=model,
        output=destination,
        methods=methods,
        peers=peers,
        num_samples=samples,
        length=length,
        threads=threads,
        repeats=repeats,
        held_out_tokens=held_out,
        recipes=tuple(recipe or []),
    )
    with progress_bars() as progress:
        report = bench_quantize(options, progress)
    if markdown:
        output.print(markdown_table(report), markup=False, highlight=False, soft_wrap=True)
    else:
        output.print(render_table(report))
    raise typer.Exit(int(exit_code(report)))


@app.command()
def gguf(
    destination: Annotated[Path, typer.Option("--output", "-o", help="JSON file to write.")],
    kind: Annotated[
        list[str] | None,
        typer.Option(
            "--type",
            help="Q4_K_M, Q4_K, IQ4_XS, ...; may be repeated. [default: one of each width]",
        ),
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Folder of a checkpoint. [default: the benchmark's own]")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration blocks.")] = 128,
    length: Annotated[int, typer.Option(min=16, help="Tokens of each.")] = 512,
    threads: Annotated[int, typer.Option(min=1, help="Of every quantizer.")] = 2,
    repeats: Annotated[int, typer.Option(min=1, help="Runs a row.")] = 1,
    held_out: Annotated[int, typer.Option(min=512, help="Tokens to measure on.")] = 65_536,
    markdown: Annotated[bool, typer.Option(help="Print the table as Markdown.")] = False,
) -> None:
    """Write GGUF files by llama.cpp and by llmopt; exit 3 if one failed, 4 if llama.cpp is absent.

    llama.cpp is installed once, in an environment of its own in llmopt's cache.
    """
    from llmopt.bench.gguf import DEFAULT_TYPES, GGUFOptions, bench_gguf, find_file_kind
    from llmopt.bench.gguf_table import gguf_markdown, render_gguf_table
    from llmopt.bench.quantize import check_output_file, exit_code_of

    check_output_file(destination)
    options = GGUFOptions(
        kinds=tuple(find_file_kind(name) for name in dict.fromkeys(kind or DEFAULT_TYPES)),
        model=model or _own_model(),
        output=destination,
        num_samples=samples,
        length=length,
        threads=threads,
        repeats=repeats,
        held_out_tokens=held_out,
    )
    with progress_bars() as progress:
        report = bench_gguf(options, progress)
    if markdown:
        output.print(gguf_markdown(report), markup=False, highlight=False, soft_wrap=True)
    else:
        output.print(render_gguf_table(report))
    raise typer.Exit(int(exit_code_of([row.run for row in report.rows])))


@app.command()
def ablate(
    destination: Annotated[Path, typer.Option("--output", "-o", help="Markdown file to write.")],
    model: Annotated[
        Path | None, typer.Option(help="Folder of a checkpoint. [default: the benchmark's own]")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration blocks.")] = 128,
    length: Annotated[int, typer.Option(min=16, help="Tokens of each.")] = 512,
    held_out: Annotated[int, typer.Option(min=512, help="Tokens to measure on.")] = 65_536,
) -> None:
    """Change one choice of the int4-gptq recipe at a time, and measure what it is worth."""
    from llmopt.bench.ablation import ablate as run
    from llmopt.bench.ablation import markdown_table
    from llmopt.bench.quantize import calibration_tokens, check_output_file

    check_output_file(destination)
    model = model or _own_model()
    tokens = calibration_tokens(model, samples, length)
    with progress_bars() as progress:
        rows = run(model, tokens, held_out_tokens=held_out, progress=progress, output=destination)
    output.print(markdown_table(rows), markup=False, highlight=False, soft_wrap=True)


@app.command()
def road(
    model: Annotated[Path, typer.Argument(help="Folder of a checkpoint.")],
    destination: Annotated[Path, typer.Option("--output", "-o", help="JSON file to write.")],
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", help="A recipe's name or YAML file.")
    ] = "int4-gptq",
    samples: Annotated[int, typer.Option(min=1, help="Calibration blocks.")] = 128,
    length: Annotated[int, typer.Option(min=16, help="Tokens of each.")] = 512,
    threads: Annotated[int, typer.Option(min=1, help="Of torch.")] = 2,
) -> None:
    """Go the whole road once, gate included, and show its memory beside the bound."""
    from llmopt.bench.measuring import RunError
    from llmopt.bench.road import bench_road, road_markdown
    from llmopt.errors import ExitCode

    try:
        report = bench_road(
            model, destination, recipe=recipe, num_samples=samples, length=length, threads=threads
        )
    except RunError as error:
        errors.print(str(error), markup=False, highlight=False)
        raise typer.Exit(int(ExitCode.FAIL)) from error
    output.print(road_markdown(report), markup=False, highlight=False, soft_wrap=True)


@app.command()
def grow(
    source: Annotated[Path, typer.Argument(help="Folder of a checkpoint in 16 bit.")],
    destination: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    parameters: Annotated[str, typer.Option(help="About so many: 300M, 1B, ...")] = "300M",
    positions: Annotated[
        int, typer.Option(min=0, help="The least context to allow. [default: the source's]")
    ] = 0,
) -> None:
    """Write a model that computes what SOURCE computes, at the cost of a larger one."""
    from llmopt.bench.grown_model import grow_checkpoint
    from llmopt.bench.growth import parse_count

    count = parse_count(parameters)
    with progress_bars() as progress:
        made = grow_checkpoint(source, destination, count, positions=positions, progress=progress)
    growth = made.growth
    told = (
        f"{made.num_parameters:,} parameters: {growth.num_blocks} blocks, {growth.factor} x as wide"
    )
    output.print(f"{destination}: {told}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def decode(
    destination: Annotated[Path, typer.Option("--output", "-o", help="Folder for the reports.")],
    model: Annotated[
        Path | None, typer.Argument(help="Folder of a checkpoint. [default: the demo model]")
    ] = None,
    grown: Annotated[
        str | None, typer.Option(help="Grow it to 300M, 1B, ... parameters first.")
    ] = None,
    batch: Annotated[str, typer.Option(help="Numbers of requests at once.")] = "1,4,16",
    context: Annotated[str, typer.Option(help="Tokens of a prompt.")] = "128,1024",
    weights: Annotated[str, typer.Option(help="16-bit, int4.")] = "16-bit,int4",
    kv: Annotated[str, typer.Option(help="16-bit, fp8, int8, int4.")] = "16-bit,int8,int4",
    peer: Annotated[
        str, typer.Option(help="transformers, llama.cpp, vllm; or none.")
    ] = "transformers,llama.cpp,vllm",
    gguf_type: Annotated[
        str, typer.Option("--gguf", help="Kinds of files for llama.cpp.")
    ] = "BF16,Q4_0,Q4_K_M",
    new_tokens: Annotated[int, typer.Option(min=2, help="That each request wants.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Runs a row.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="Of every engine.")] = 2,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16, float32.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    recipe: Annotated[str, typer.Option(help="That gives the INT4 weights.")] = "int4-rtn",
    timeout: Annotated[
        float | None, typer.Option(help="Seconds after which an engine is ended.")
    ] = None,
    markdown: Annotated[bool, typer.Option(help="Print the table as Markdown.")] = False,
) -> None:
    """Decode by llmopt and its peers; exit 3 if one failed, 4 if one is unavailable.

    llama.cpp is installed once, in an environment of its own in llmopt's cache; vLLM is used where
    its environment is there.
    """
    from llmopt.bench.decode.choices import DecodeChoices, decode_options
    from llmopt.bench.decode.run import bench_decode
    from llmopt.bench.decode.table import decode_markdown, render_decode_table
    from llmopt.bench.quantize import exit_code_of

    choices = DecodeChoices(
        model=model,
        grown=grown,
        batch=batch,
        context=context,
        weights=weights,
        kv=kv,
        peer=peer,
        gguf=gguf_type,
        new_tokens=new_tokens,
        repeats=repeats,
        threads=threads,
        dtype=dtype,
        device=device,
        recipe=recipe,
        timeout_s=timeout,
    )
    with progress_bars() as progress:
        options = decode_options(choices, destination, progress)
        report = bench_decode(options, progress)
    if markdown:
        output.print(decode_markdown(report), markup=False, highlight=False, soft_wrap=True)
    else:
        output.print(render_decode_table(report))
    raise typer.Exit(int(exit_code_of(report.rows)))


def _own_model() -> Path:
    from llmopt.bench.model import bench_model

    errors.print("the benchmark's model is trained on its first use, some minutes")
    return bench_model()


@app.command()
def model(
    random_1b: Annotated[
        Path | None,
        typer.Option(help="Write a random Llama of 1.1 billion parameters into this folder."),
    ] = None,
) -> None:
    """Make the model that quantizers are timed on, and say where it lies."""
    if random_1b is not None:
        from llmopt.bench.random_llama import write_random_llama

        write_random_llama(random_1b)
        output.print(str(random_1b), markup=False, highlight=False, soft_wrap=True)
        return
    from llmopt.bench.model import bench_model

    output.print(str(bench_model()), markup=False, highlight=False, soft_wrap=True)
