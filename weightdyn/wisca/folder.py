"""A model folder in, the same folder with balanced weights out, and the proof that it computes the same.

transformers reads and writes the weights; no code that a folder brings with it is run.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from weightdyn.core.checks import check_path
from weightdyn.core.progress import Progress, is_watched
from weightdyn.files.weightfiles import CheckpointError
from weightdyn.wisca.apply import rescale_

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".index.json", ".gguf", ".onnx")
_TOKENS = 16


def rescale_folder(source: str | Path, out: str | Path, **options: Any) -> tuple[pd.DataFrame, float, float]:
    """Rescale a model that was saved by transformers, and save it in the same format and types.

    Args:
        source: folder with config.json and weights.
        out: folder for the result; it must not exist, or be empty. Tokenizer and other files are copied.
        options: of `rescale_`: pairs, norm, granularity, power_of_two, max_alpha, errors, progress.

    Returns:
        The table of `rescale_`; max|Δlogit| and max|logit| on 16 random tokens, in the model's own type.

    Raises:
        FileNotFoundError: `source` holds no config.json.
        FileExistsError: `out` is not empty.
        CheckpointError: transformers cannot read what `source` holds.
        TypeError, ValueError: as `rescale_`; nothing is written.
        ImportError: transformers is not installed.
    """
    source = check_path("source", source, "the folder of a model")
    out = check_path("out", out, "a new folder for the result")
    try:
        import transformers
    except ImportError as error:
        raise ImportError('rescale_folder needs transformers: pip install "weightdyn[hf]"') from error
    if not (source / "config.json").is_file():
        raise FileNotFoundError(
            f"source: {source} is no folder of a transformers model: it has no config.json"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"out: {out} exists already; choose a new folder")
    with _quiet(transformers.utils.logging, options.get("progress")):
        return _rescaled(transformers, source, out, options)


def _rescaled(
    transformers: Any, source: Path, out: Path, options: dict[str, Any]
) -> tuple[pd.DataFrame, float, float]:
    try:
        model = _read(transformers, source)
        vocabulary = int(model.config.get_text_config().vocab_size)
    except Exception as error:  # transformers and what it reads with raise errors of many kinds
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"source: {source} cannot be read as a transformers model ({type(error).__name__}: {reason}); fetch or "
            "copy its config.json and weights again"
        ) from error
    batch = torch.randint(vocabulary, (1, _TOKENS), generator=torch.Generator().manual_seed(0))
    before = _outputs(model, batch)
    table = rescale_(model, **options)
    difference = float((_outputs(model, batch) - before).abs().max())
    model.save_pretrained(out)
    for file in source.iterdir():
        if file.is_file() and not file.name.endswith(_WEIGHTS) and not (out / file.name).exists():
            shutil.copy2(file, out / file.name)
    return table, difference, float(before.abs().max())


@contextlib.contextmanager
def _quiet(logging: Any, progress: Progress) -> Iterator[None]:
    """Without transformers' own bars where nobody watches."""
    silent = not is_watched(progress) and logging.is_progress_bar_enabled()
    if silent:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if silent:
            logging.enable_progress_bar()


def _read(transformers: Any, source: Path) -> Any:
    """The model, by the class that its configuration names where transformers has it."""
    # trust_remote_code is said, for else transformers asks at the terminal.
    options = {"trust_remote_code": False, "local_files_only": True}
    config = transformers.AutoConfig.from_pretrained(source, **options)
    named = next(iter(config.architectures or ()), "")
    kind = getattr(transformers, named, None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        kind = transformers.AutoModelForCausalLM
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    dtype = "dtype" if version >= (4, 56) else "torch_dtype"
    return kind.from_pretrained(source, **options, **{dtype: "auto"}).eval()


@torch.no_grad()
def _outputs(model: Any, batch: torch.Tensor) -> torch.Tensor:
    return model(input_ids=batch)[0].double()
