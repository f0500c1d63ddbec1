"""``hedgerow certify``: a gate with a guarantee for any two models, from calibration data."""

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from hedgerow.errors import InvalidInput


def certify(
    edge: Annotated[Path, typer.Option(metavar="FILE.onnx", help="The small model.", exists=True, dir_okay=False)],
    cloud: Annotated[
        str,
        typer.Option(
            metavar="grpc://HOST:PORT/MODEL|FILE.onnx", help="The large one: behind any OIP server, or a file."
        ),
    ],
    data: Annotated[
        Path, typer.Option(metavar="FILE.npz", help="Inputs by name, and `labels` where the risk needs them.")
    ],
    risk: Annotated[
        str, typer.Option(help="disagreement, accuracy, selective or selective-accuracy.")
    ] = "disagreement",
    epsilon: Annotated[float, typer.Option(help="The risk that is allowed.")] = 0.01,
    delta: Annotated[float, typer.Option(help="How likely the promise may be broken by bad luck.")] = 0.05,
    output: Annotated[str, typer.Option(help="The output that is judged [default: the only one].")] = "",
    score: Annotated[str, typer.Option(help="How answers are scored [default: what ranks failures best].")] = "",
    probabilities: Annotated[bool, typer.Option("--probabilities", help="The output holds probabilities.")] = False,
    engine: Annotated[str, typer.Option(help="What runs the small model, here and on devices.")] = "onnxruntime",
    precision: Annotated[str, typer.Option(help="What the small model's file is, as devices are told.")] = "",
    seed: Annotated[int, typer.Option(help="Of the order of the samples.")] = 0,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png|svg", help="Where to draw risk over coverage.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Where to write the guarantee.", show_default=False)
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="JSON on standard output.")] = False,
) -> None:
    """Find the gate that sends the least to the cloud and keeps a promise."""
    import numpy as np

    from hedgerow.gate import Gate
    from hedgerow_cloud.certify import guarantee, measure
    from hedgerow_cloud.certify import plot as pictures
    from hedgerow_cloud.certify.risks import RISKS
    from hedgerow_cloud.cli import console

    if risk not in RISKS:
        raise InvalidInput(f"--risk {risk}: there are {', '.join(RISKS)}")
    if plot is not None:
        pictures.check(plot)
    samples = measure.load(data)
    with console.progress("asking the small model", "samples") as advance:
        small = measure.of_file(edge, engine, precision, samples, advance)
    with console.progress(f"asking the large one, {cloud}", "samples") as advance:
        if cloud.startswith(measure.SCHEME):
            large = measure.of_server(cloud, samples, advance)
        else:
            large = measure.of_file(Path(cloud), engine, "", samples, advance)
    name = output or next(iter(small.outputs))
    drawn = guarantee.sample(small.output(output), large.output(output), RISKS[risk], samples.labels)
    drawn = drawn.part(np.random.default_rng(seed).permutation(len(drawn)))
    try:
        gate = Gate(score=score or "max_probability", output=name, threshold=0.0, probabilities=probabilities)
    except ValueError as error:
        raise InvalidInput(f"--score: {error}") from error
    if not score:
        some = min(guarantee.MAX_CHOSEN_ON, round(guarantee.CHOSEN_ON * len(drawn)))
        gate = guarantee.best_gate(drawn.part(slice(some)), guarantee.candidates(gate))
        drawn = drawn.part(slice(some, None))
    provenance = guarantee.Provenance(
        calibration_sha256=samples.sha256,
        student_sha256=small.sha256,
        teacher_sha256=large.sha256,
        engine=small.engine,
        precision=precision,
    )
    found = guarantee.certify(drawn, provenance, epsilon=epsilon, delta=delta, risk=RISKS[risk], gate=gate)
    if plot is not None:
        pictures.draw(plot, drawn, found)
    if out is not None:
        out.write_bytes(msgspec.json.format(msgspec.json.encode(found, order="deterministic"), indent=1) + b"\n")
    if json:
        console.say_json(msgspec.to_builtins(found))
        return
    by = f"{found.score_name} of {found.gate.output}"
    print(f"guarantee  {found}")
    print(f"gate       {by} at temperature {found.gate.temperature:g}, λ = {found.gate.threshold:.6g}")
    print(f"bound      {found.bound}: {found.errors:g} lost of {found.samples} samples")
    print(f"cloud      {found.escalated:.1%} of the requests go there")
    for name, file in (("guarantee", out), ("curve", plot)):
        if file is not None:
            console.note(f"{name} written to {file}")
    shares = guarantee.escalated(found, drawn)
    rows = [(level, f"{threshold:.6g}", f"{shares[level]:.1%}") for level, threshold in found.thresholds.items()]
    console.table(("ε", "λ", "to the cloud"), rows)
