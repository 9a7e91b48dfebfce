"""A model folder in, the same folder with balanced weights out, and the proof that it computes the same."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from weightdyn.wisca.apply import rescale_

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".index.json", ".gguf", ".onnx")
_TOKENS = 16


def rescale_folder(source: str | Path, out: str | Path, **options: Any) -> tuple[pd.DataFrame, float, float]:
    """Rescale a model that was saved by transformers, and save it in the same format and types.

    Args:
        source: folder with config.json and weights.
        out: folder for the result; it must not exist, or be empty. Tokenizer and other files are copied.
        options: of `rescale_`: pairs, norm, granularity, power_of_two, max_alpha, errors.

    Returns:
        The table of `rescale_`; max|Δlogit| and max|logit| on 16 random tokens, in the model's own type.

    Raises:
        FileNotFoundError: `source` holds no config.json.
        FileExistsError: `out` is not empty.
        ValueError: as `rescale_`; nothing is written.
        ImportError: transformers is not installed.
    """
    import transformers

    source, out = Path(source), Path(out)
    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"{source} is no folder of a transformers model: it has no config.json")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists already; choose a new folder")
    config = transformers.AutoConfig.from_pretrained(source)
    kind = getattr(transformers, (config.architectures or [""])[0], transformers.AutoModelForCausalLM)
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    argument = "dtype" if version >= (4, 56) else "torch_dtype"
    model = kind.from_pretrained(source, **{argument: "auto"}).eval()
    generator = torch.Generator().manual_seed(0)
    batch = torch.randint(config.vocab_size, (1, _TOKENS), generator=generator)
    before = _outputs(model, batch)
    table = rescale_(model, **options)
    difference = float((_outputs(model, batch) - before).abs().max())
    model.save_pretrained(out)
    for file in source.iterdir():
        if file.is_file() and not file.name.endswith(_WEIGHTS) and not (out / file.name).exists():
            shutil.copy2(file, out / file.name)
    return table, difference, float(before.abs().max())


@torch.no_grad()
def _outputs(model: Any, batch: torch.Tensor) -> torch.Tensor:
    return model(input_ids=batch)[0].double()
