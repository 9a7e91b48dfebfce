"""Every cell of every notebook runs."""

import json
from pathlib import Path

import matplotlib as mpl
import pytest
import torch

mpl.use("Agg")

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_cells_run_in_their_order(path):
    import matplotlib.pyplot as plt

    torch.manual_seed(0)
    cells = [
        cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"
    ]
    assert cells
    names: dict = {}
    for cell in cells:
        assert not cell["outputs"]  # stored outputs go stale
        source = (
            "".join(cell["source"]).replace("steps = 400", "steps = 40").replace("seq_len=128", "seq_len=16")
        )
        exec(compile(source, path.name, "exec"), names)
    assert names["run"].forces()["step"].max() == 40
    plt.close("all")
