"""Training one network on Ray Train: images and soft targets in, weights and an ONNX file out.

The worker process trains and exports, so torch never loads in the caller. Needs a running Ray: see
`hedgerow_cloud.cluster`.
"""

import logging
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from hedgerow.errors import HedgerowError
from hedgerow_cloud.learn.data import PIXELS, Images

INPUT: Final = "image"
OUTPUT: Final = "logits"
WEIGHTS: Final = "weights.pt"
MODEL: Final = "model.onnx"
MAX_TRAINING_S: Final = 120.0
"""How long a worker may train before it gives up."""
MAX_OVERHEAD_S: Final = 60.0
"""How much longer Ray may take to start the worker and to bring back what it made."""

T = TypeVar("T")
Targets = NDArray[np.float32]
"""Class probabilities, shape (n, 10), rows summing to 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How to train: `network` by its name in `networks`, AdamW with a one-cycle rate up to `learning_rate`."""

    network: str
    epochs: int
    batch: int
    learning_rate: float
    weight_decay: float
    augment: bool = False
    threads: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What training left behind: both files are in the folder given to `train`."""

    weights: Path
    onnx: Path


def train(
    recipe: Recipe, images: Images, targets: Targets, into: Path, *, seed: int, start: Path | None = None
) -> Trained:
    """Train on `images` and `targets` and write the result into the folder `into`.

    `start` names weights to start from. The same arguments give the same weights on the same kind of machine. Raises
    `HedgerowError` saying what went wrong in the worker.
    """
    from ray.exceptions import RayError
    from ray.train import RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    storage = into.resolve() / "ray"
    storage.mkdir(parents=True, exist_ok=True)
    trainer = TorchTrainer(
        _work,
        train_loop_config={
            "recipe": asdict(recipe),
            "images": images,
            "targets": targets,
            "seed": seed,
            "start": start.read_bytes() if start else None,
        },
        scaling_config=ScalingConfig(num_workers=1, use_gpu=False),
        run_config=RunConfig(name=recipe.network, storage_path=str(storage)),
    )
    try:
        result = _within(trainer.fit, MAX_TRAINING_S + MAX_OVERHEAD_S)
    except TrainingFailedError as error:
        raise HedgerowError(f"training the {recipe.network} failed: {_reason(error)}") from error
    except (RayError, TimeoutError) as error:
        raise HedgerowError(f"training the {recipe.network} failed with Ray itself: {type(error).__name__}") from error
    if result.checkpoint is None:
        raise HedgerowError(f"training the {recipe.network} left no checkpoint")
    with result.checkpoint.as_directory() as folder:
        for name in (WEIGHTS, MODEL):
            shutil.copyfile(Path(folder, name), into / name)
    shutil.rmtree(storage)
    return Trained(weights=into / WEIGHTS, onnx=into / MODEL)


def _work(config: dict[str, Any]) -> None:
    """The training loop, in a worker process of Ray Train."""
    import io

    import ray.train
    import ray.train.torch
    import torch
    from torch.nn import functional
    from torch.utils.data import DataLoader, TensorDataset

    from hedgerow_cloud.learn.networks import NETWORKS, augmented

    recipe = Recipe(**config["recipe"])
    torch.manual_seed(config["seed"])
    torch.set_num_threads(recipe.threads)
    torch.use_deterministic_algorithms(True)
    network = NETWORKS[recipe.network]()
    if config["start"] is not None:
        network.load_state_dict(torch.load(io.BytesIO(config["start"]), weights_only=True))
    examples = TensorDataset(torch.tensor(config["images"]), torch.tensor(config["targets"]))
    generator = torch.Generator().manual_seed(config["seed"])
    batches = DataLoader(examples, recipe.batch, shuffle=True, generator=generator)
    optimizer = torch.optim.AdamW(network.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=recipe.epochs * len(batches)
    )
    end, loss_of_epoch = time.monotonic() + MAX_TRAINING_S, 0.0
    network.train()
    for epoch in range(recipe.epochs):
        if time.monotonic() > end:
            raise TimeoutError(f"only {epoch} of {recipe.epochs} epochs after {MAX_TRAINING_S:g} s")
        losses = []
        for batch_images, batch_targets in batches:
            seen = augmented(batch_images, generator) if recipe.augment else batch_images
            loss = functional.cross_entropy(network(seen), batch_targets)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
            optimizer.step()
            schedule.step()
            losses.append(loss.item() * len(batch_images))
        loss_of_epoch = sum(losses) / len(examples)
    if not np.isfinite(loss_of_epoch):
        raise ArithmeticError(f"the loss became {loss_of_epoch}")
    with tempfile.TemporaryDirectory() as folder:
        torch.save(network.state_dict(), Path(folder, WEIGHTS))
        _export(network, Path(folder, MODEL))
        ray.train.report({"loss": loss_of_epoch}, checkpoint=ray.train.Checkpoint.from_directory(folder))


def _export(network: Any, path: Path) -> None:
    """Write `network` as ONNX with a free batch size, and without the traces of where it was exported."""
    import onnx
    import torch

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of packages that we do not use
    program = torch.onnx.export(
        network.eval(),
        (torch.zeros(2, PIXELS),),
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    model = program.model_proto
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


def _within(work: Callable[[], T], limit_s: float) -> T:
    """What `work` returns or raises; `TimeoutError` after `limit_s`, for work that has no time-out of its own.

    It runs on a thread that is left behind then, and ends when Ray is shut down.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:  # noqa: BLE001 (handed to the caller)
            outcome.set_exception(error)

    threading.Thread(target=run, name="hedgerow-train", daemon=True).start()
    return outcome.result(limit_s)


def _reason(error: Exception) -> str:
    """The last line of a worker's traceback: the error itself."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
